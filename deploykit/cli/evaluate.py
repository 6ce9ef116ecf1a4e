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
from deploykit.errors import DataError, UsageError
from deploykit.tasks.protocol import Evaluation, Task
from deploykit.tasks.text_generation.syntax import SYNTAXES


@deploykit_command(
    help="Measure the accuracy of TARGET (checkpoint folder or .gguf file, export, packaged model, or a served model's name) on labelled rows."
)
@click.argument("target")
@click.option("--baseline", metavar="TARGET", help="Measure this model on the same rows, and print both.")
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
    baseline: str | None,
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

    def measure(name: str, wanted: Task | None = None) -> tuple[Task, Evaluation]:
        predictor = open_predictor(name, **where)
        try:
            task = task_of(predictor.task)
            if wanted is not None and task.name != wanted.name:
                raise UsageError(f"{name} {task.does}, and {target} {wanted.does}", "give two models of one task")
            own = columns_for(task, columns, generation)
            with progress_bar("rows") as progress:
                found = task.evaluate(
                    predictor, data, split=split, reading=reading, columns=own, generation=generation, progress=progress
                )
        finally:
            predictor.close()
        reading.stop_at(found.problems)
        for note in found.notes:
            say(note)
        return task, found

    if baseline == target:
        raise UsageError(f"--baseline is {target}, as TARGET", "give another model")
    task, done = measure(target)
    record = {"target": target, "rows": done.rows, "skipped": done.skipped, "metrics": done.metrics}
    sides = {"": done.metrics}
    if baseline is not None:
        _, base = measure(baseline, task)
        _check_same_rows(target, done, baseline, base)
        record["baseline"] = {"target": baseline, "metrics": base.metrics}
        sides = {baseline: base.metrics, target: done.metrics}
    skipped = f" ({done.skipped:,} skipped)" if done.skipped else ""
    text = f"{target} on {done.rows:,} rows of {data}{skipped}\n{task.metrics_text(sides)}"
    return record, text, failed_rows(done.problems)


def _check_same_rows(target: str, done: Evaluation, baseline: str, base: Evaluation) -> None:
    """Raise DataError if a row was skipped for one model alone."""
    skipped = [{problem.partition(": ")[0] for problem in one.problems} for one in (done, base)]
    if differing := sorted(skipped[0] ^ skipped[1]):
        raise DataError(
            f"{differing[0]}: only one of {target} and {baseline} takes this row, so their metrics are of different rows",
            "give --data without such rows",
        )
