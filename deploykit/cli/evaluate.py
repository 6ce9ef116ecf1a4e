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
    progress_bar,
    refuse_columns,
)


@deploykit_command(
    help="Measure TARGET (checkpoint, export, packaged model, or a served model's name) on labelled or translated rows, or on prompts and answers."
)
@click.argument("target")
@click.option("--data", required=True, help="csv, tsv, jsonl, parquet, HF dataset folder or hub id; for translation also "
              "TMX, .po, .mo, two text files as a.en,a.fr.")  # fmt: skip
@click.option("--text-column", multiple=True, help="(default: the training columns, or detected)")
@click.option("--label-column", help="(default: the training column, or detected)")
@click.option("--source-column", help="Of texts to translate (default: the training column, or detected).")
@click.option("--target-column", help="Of their translations (default: the training column, or detected).")
@click.option("--prompt-column", help="(default: the training column, or detected)")
@click.option("--completion-column", help="(default: the training column, or detected)")
@click.option("--answer-regex", help="Of generated answers, compare what this finds last (its first group).")
@click.option("--syntax", type=click.Choice(["bash", "python", "json"]), help="Count generated answers that parse.")
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
    prompt_column: str | None,
    completion_column: str | None,
    answer_regex: str | None,
    syntax: str | None,
    split: str,
    generation: dict[str, Any],
    encoding: str | None,
    **where: Any,
) -> Result:
    from deploykit.tasks.opening import open_predictor
    from deploykit.tasks.registry import task_of

    columns = {
        "text_column": text_column, "label_column": label_column, "source_column": source_column,
        "target_column": target_column, "prompt_column": prompt_column, "completion_column": completion_column,
        "answer_regex": answer_regex, "syntax": syntax,
    }  # fmt: skip
    predictor = open_predictor(target, **where)
    try:
        task = task_of(predictor.task)
        refuse_columns(task, columns, generation)
        with progress_bar("rows") as progress:
            done = task.evaluate(
                predictor, data, split=split, encoding=encoding, columns=columns, generation=generation,
                progress=progress,
            )  # fmt: skip
    finally:
        predictor.close()
    skipped = f" ({done.skipped:,} skipped: incomplete)" if done.skipped else ""
    text = f"{target} on {done.rows:,} rows of {data}{skipped}\n{task.metrics_text(done.metrics)}"
    return {"target": target, "rows": done.rows, "skipped": done.skipped, "metrics": done.metrics}, text
