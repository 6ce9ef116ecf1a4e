from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from deploykit.cli.common import ENCODING, FORCE, Result, deploykit_command, human_bytes, say


@deploykit_command(help="Export a checkpoint to ONNX, optionally calibrated INT8.")
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder to write the export to.")
@click.option("--int8", is_flag=True, help="Also write INT8 graphs, calibrated and checked.")
@click.option("--calibration", default="train", show_default=True, help="A split of the run, or a file of rows.")
@click.option("--calibration-rows", type=int, default=512, show_default=True)
@click.option(
    "--method", type=click.Choice(["minmax", "entropy", "percentile", "mse"]), default="minmax", show_default=True
)
@click.option("--max-drop", type=float, default=0.5, show_default=True,
              help="Points of macro-F1, or of BLEU and of chrF, that INT8 may lose.")  # fmt: skip
@click.option("--data", help="Rows to measure on (default: the run's test rows).")
@click.option("--measure-rows", type=int, default=0, help="Most of them to use [default: all; 500 to translate].")
@click.option("--source", help="Language of a translation checkpoint that was trained elsewhere.")
@click.option("--target", help="Language it translates into.")
@ENCODING
@FORCE
def command(*, checkpoint: Path, out: Path, force: bool, **values: Any) -> Result:
    from deploykit.finetune.checkpoint import quiet

    quiet()
    from deploykit.export.run import ExportOptions, export
    from deploykit.export.tables import render

    done = export(checkpoint, out, ExportOptions(**values), force=force, say=say)
    metrics = done.manifest.metrics
    sizes = {n: r.bytes for n, r in done.manifest.files.items() if n.endswith((".onnx", ".bin"))}
    record = {
        "out": str(out),
        "reused": done.reused,
        "digest": done.manifest.digest,
        "parity": metrics["parity"],
        "quantization": metrics.get("quantization"),
        "accuracy": metrics["accuracy_table"],
        "rows": metrics["rows"],
        "size_bytes": sizes,
    }
    text = [
        f"{out}: {'reused, made before from the same inputs' if done.reused else 'written'}",
        f"on {metrics['rows']:,} rows:",
        *render(metrics["accuracy_table"]),
        *(f"{name}: {human_bytes(size)}" for name, size in sizes.items()),
    ]
    return record, "\n".join(text)
