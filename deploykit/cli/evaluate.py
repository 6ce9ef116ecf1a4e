from __future__ import annotations

from typing import Any

import click

from deploykit.cli.common import (
    ENCODING,
    ENGINE,
    PRECISION,
    SERVER_URL,
    THREADS,
    Result,
    deploykit_command,
    metrics_text,
    progress_bar,
)


@deploykit_command(
    help="Measure TARGET (checkpoint, export, packaged model, or a served model's name) on labelled rows."
)
@click.argument("target")
@click.option("--data", required=True, help="Labelled rows: csv, tsv, jsonl, parquet, HF dataset folder or hub id.")
@click.option("--text-column", multiple=True, help="(default: the training columns, or detected)")
@click.option("--label-column", help="(default: the training column, or detected)")
@click.option("--split", default="test", show_default=True, help="Of an HF dataset.")
@ENCODING
@SERVER_URL
@ENGINE
@PRECISION
@THREADS
def command(
    *,
    target: str,
    data: str,
    text_column: tuple[str, ...],
    label_column: str | None,
    split: str,
    encoding: str | None,
    **where: Any,
) -> Result:
    from deploykit.evaluate import evaluate, labelled_rows
    from deploykit.predictor import open_predictor

    predictor = open_predictor(target, **where)
    try:
        rows = labelled_rows(
            data, predictor.task, text_columns=text_column, label_column=label_column, encoding=encoding, split=split
        )
        with progress_bar("rows") as progress:
            done = evaluate(predictor, rows, progress=progress)
    finally:
        predictor.close()
    skipped = f" ({done.skipped:,} skipped: no text or no label)" if done.skipped else ""
    text = f"{target} on {done.rows:,} rows of {data}{skipped}\n{metrics_text(done.metrics)}"
    return {"target": target, "rows": done.rows, "skipped": done.skipped, "metrics": done.metrics}, text
