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
    generation_options,
    metrics_text,
    progress_bar,
    refuse_options,
)


@deploykit_command(
    help="Measure TARGET (checkpoint, export, packaged model, or a served model's name) on labelled or translated rows."
)
@click.argument("target")
@click.option("--data", required=True, help="csv, tsv, jsonl, parquet, HF dataset folder or hub id; for translation also "
              "TMX, .po, .mo, two text files as a.en,a.fr.")  # fmt: skip
@click.option("--text-column", multiple=True, help="(default: the training columns, or detected)")
@click.option("--label-column", help="(default: the training column, or detected)")
@click.option("--source-column", help="Of texts to translate (default: the training column, or detected).")
@click.option("--target-column", help="Of their translations (default: the training column, or detected).")
@click.option("--split", default="test", show_default=True, help="Of an HF dataset.")
@generation_options
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
    source_column: str | None,
    target_column: str | None,
    split: str,
    generation: dict[str, Any],
    encoding: str | None,
    **where: Any,
) -> Result:
    from deploykit.evaluate import evaluate, evaluate_translator, labelled_rows, translated_rows
    from deploykit.predictor import is_translator, open_predictor
    from deploykit.runtime.generation import override

    predictor = open_predictor(target, **where)
    try:
        with progress_bar("rows") as progress:
            if is_translator(predictor):
                refuse_options("translates", {"--text-column": text_column, "--label-column": label_column})
                pairs = translated_rows(data, predictor.task, source_column=source_column, target_column=target_column,
                                        encoding=encoding, split=split)  # fmt: skip
                done = evaluate_translator(predictor, pairs, override(predictor.task, generation), progress=progress)
            else:
                columns = {"--source-column": source_column, "--target-column": target_column}
                refuse_options("classifies", columns, generation)
                rows = labelled_rows(data, predictor.task, text_columns=text_column, label_column=label_column,
                                     encoding=encoding, split=split)  # fmt: skip
                done = evaluate(predictor, rows, progress=progress)
    finally:
        predictor.close()
    skipped = f" ({done.skipped:,} skipped: incomplete)" if done.skipped else ""
    text = f"{target} on {done.rows:,} rows of {data}{skipped}\n{metrics_text(done.metrics)}"
    return {"target": target, "rows": done.rows, "skipped": done.skipped, "metrics": done.metrics}, text
