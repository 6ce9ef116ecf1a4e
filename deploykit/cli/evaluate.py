from __future__ import annotations

from typing import Any

import click

from deploykit.cli.common import (
    ENGINE,
    PRECISION,
    SERVER_URL,
    THREADS,
    Result,
    column_options,
    columns_for,
    deploykit_command,
    failed_rows,
    generation_options,
    option,
    progress_bar,
    reading_options,
    say,
)
from deploykit.data.reading import Reading
from deploykit.tasks.text_generation.syntax import SYNTAXES


@deploykit_command(
    help="Measure the accuracy of TARGET (checkpoint, export, packaged model, or a served model's name) on labelled rows."
)
@click.argument("target")
@click.option("--data", required=True, help="Rows: csv, tsv, jsonl, parquet, HF dataset folder or hub id; for translation also "
              "TMX, .po, .mo, or two text files as a.en,a.fr; for questions SQuAD's JSON.")  # fmt: skip
@reading_options(on_error="skip")
@column_options()
@click.option("--answer-regex", help="Compare only the last match of this (its first group) in generated answers.")
@click.option("--syntax", type=click.Choice(SYNTAXES), help="Count the generated answers that parse.")
@option(
    "--dataset-split", "split", aliases=["--split"], default="test", show_default=True, help="Split of an HF dataset."
)
@generation_options
@SERVER_URL
@ENGINE
@PRECISION
@THREADS
def command(
    *,
    target: str,
    data: str,
    columns: dict[str, Any],
    answer_regex: str | None,
    syntax: str | None,
    split: str,
    generation: dict[str, Any],
    reading: Reading,
    **where: Any,
) -> Result:
    from deploykit.tasks.opening import open_predictor
    from deploykit.tasks.registry import task_of

    columns = {**columns, "answer_regex": answer_regex, "syntax": syntax}
    predictor = open_predictor(target, **where)
    try:
        task = task_of(predictor.task)
        columns = columns_for(task, columns, generation)
        with progress_bar("rows") as progress:
            done = task.evaluate(
                predictor, data, split=split, reading=reading, columns=columns, generation=generation,
                progress=progress,
            )  # fmt: skip
    finally:
        predictor.close()
    reading.stop_at(done.problems)
    for note in done.notes:
        say(note)
    skipped = f" ({done.skipped:,} skipped)" if done.skipped else ""
    text = f"{target} on {done.rows:,} rows of {data}{skipped}\n{task.metrics_text(done.metrics)}"
    return (
        {"target": target, "rows": done.rows, "skipped": done.skipped, "metrics": done.metrics},
        text,
        failed_rows(done.problems),
    )
