from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from deploykit.cli_parts.command import Result, deploykit_command, option, say
from deploykit.cli_parts.shared_options import (
    CALIBRATION,
    CALIBRATION_DATA,
    CALIBRATION_ROWS,
    CALIBRATION_SPLIT,
    FORCE,
    LABEL_COLUMN,
    OUTPUT_DIR,
    SOURCE_LANG,
    TARGET_LANG_HELP,
    TEXT_COLUMN,
    reading_fields,
    with_calibration,
)


@deploykit_command(
    help="Collect the activation ranges that INT8 needs: run real rows through the fp32 graph of TARGET, a checkpoint or an export."
)
@click.argument("path", metavar="TARGET", type=click.Path(path_type=Path))
@OUTPUT_DIR
@CALIBRATION_SPLIT
@CALIBRATION_DATA
@CALIBRATION
@CALIBRATION_ROWS
@TEXT_COLUMN
@LABEL_COLUMN
@SOURCE_LANG
@option("--target-lang", aliases=["--target"], help=TARGET_LANG_HELP)
@reading_fields
@FORCE
def command(*, path: Path, out: Path, force: bool, **values: Any) -> Result:
    from deploykit.graphs.export_options import CalibrationOptions
    from deploykit.quantization.tables import render_calibration
    from deploykit.stages.calibrate import calibrate

    done = calibrate(path, out, CalibrationOptions(**with_calibration(values)), force=force, say=say)
    record = {"out": str(out), "reused": done.reused, "digest": done.manifest.digest, **done.manifest.metrics}
    head = f"{out}: {'reused, made before from the same inputs' if done.reused else 'written'}"
    return record, "\n".join([head, *render_calibration(done.manifest.metrics)])
