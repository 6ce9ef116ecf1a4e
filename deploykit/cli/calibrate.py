from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from deploykit.cli.common import CALIBRATION_ROWS, ENCODING, FORCE, Result, deploykit_command, say


@deploykit_command(
    help="Collect the activation ranges that INT8 needs: run real rows through the fp32 graph of CHECKPOINT_OR_EXPORT."
)
@click.argument("path", metavar="CHECKPOINT_OR_EXPORT", type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder to write the calibration to.")
@click.option("--calibration", default="train", show_default=True, help="Rows to use: a split of the run, or a file.")
@CALIBRATION_ROWS
@click.option("--source", help="Source language, if deploykit did not train the translation checkpoint.")
@click.option("--target", help="Target language, in the same case.")
@ENCODING
@FORCE
def command(*, path: Path, out: Path, force: bool, **values: Any) -> Result:
    from deploykit.export.calibrate import calibrate
    from deploykit.graphs.export_options import CalibrationOptions
    from deploykit.quantization.tables import render_calibration

    done = calibrate(path, out, CalibrationOptions(**values), force=force, say=say)
    record = {"out": str(out), "reused": done.reused, "digest": done.manifest.digest, **done.manifest.metrics}
    head = f"{out}: {'reused, made before from the same inputs' if done.reused else 'written'}"
    return record, "\n".join([head, *render_calibration(done.manifest.metrics)])
