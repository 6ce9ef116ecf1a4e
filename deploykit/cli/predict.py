from __future__ import annotations

from functools import partial
from typing import Any

import click

from deploykit.cli_parts.asked_texts import answered_record, answered_text, check_asked, failed_rows, failed_texts
from deploykit.cli_parts.command import Result, deploykit_command
from deploykit.cli_parts.many_rows import OUTPUT, RAY, answer_all, refuse_ray
from deploykit.cli_parts.shared_options import (
    FORCE,
    column_options,
    columns_for,
    generation_options,
    model_options,
    reading_options,
    target_and_texts,
)
from deploykit.data.reading import Reading
from deploykit.errors import UsageError


@deploykit_command(
    help="Answer TEXTS, or the rows of a file, with TARGET: a checkpoint, an export, a packaged model, or a served model's name."
)
@target_and_texts
@click.option(
    "--input",
    "source",
    help="Rows to answer: .txt (a text a line), csv, tsv, jsonl, parquet; for questions SQuAD's JSON.",
)
@click.option("--text-pair", "pairs", multiple=True, help="Second text of a pair; one for each text.")
@OUTPUT
@RAY
@reading_options(on_error="skip")
@column_options(inputs_only=True)
@generation_options
@FORCE
@model_options
def command(
    *,
    texts: tuple[str, ...],
    model: str,
    source: str | None,
    output: str | None,
    ray: str | None,
    pairs: tuple[str, ...],
    columns: dict[str, Any],
    generation: dict[str, Any],
    reading: Reading,
    force: bool,
    **where: Any,
) -> Result:
    check_asked("predict", "some text", texts, source, output, reading)

    from deploykit.tasks.answering import answer_rows, answer_source, rows_of
    from deploykit.tasks.opening import open_predictor
    from deploykit.tasks.registry import task_of

    predictor = open_predictor(model, **where)
    try:
        task = task_of(predictor.task)
        columns = columns_for(task, columns, generation)
        search = task.override(predictor.task, generation) if generation else None
        if source is None or output is None:
            refuse_ray(ray)
            asked = list(zip(texts, pairs)) if pairs else texts
            if pairs and len(pairs) != len(texts):
                raise UsageError(
                    f"there are {len(texts)} texts and {len(pairs)} of --text-pair", "give as many of each"
                )
            answered = answer_rows(predictor, rows_of(asked, predictor.task), search)
            records = [row.to_json() for row in answered]
            code = failed_texts(records, stop=reading.on_error == "stop", remedy="give another text")
            return {"results": records}, "\n".join(row.line() for row in answered), code
        answer = partial(answer_source, columns=columns, generation=search)
        done = answer_all(
            answer, predictor, model, source, output, where=where, ray=ray, reading=reading, force=force,
            of_answers=(columns, search),
        )  # fmt: skip
    finally:
        predictor.close()
    text = answered_text(output, done, 'could not be answered, see their "error"')
    return answered_record(output, done), text, failed_rows(done.problems)
