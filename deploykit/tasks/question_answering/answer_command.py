from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import click

from deploykit.cli_parts.asked_texts import answered_record, failed_rows, failed_texts
from deploykit.cli_parts.command import Result, deploykit_command, progress_bar
from deploykit.cli_parts.many_rows import OUTPUT, RAY, answer_all, refuse_ray
from deploykit.cli_parts.shared_options import FORCE, check_page, model_options, reading_options
from deploykit.data.reading import Reading
from deploykit.errors import UsageError


@deploykit_command(help="Answer questions about a text with TARGET: a checkpoint, an export, a packaged model, or a served model's "
                   "name.")  # fmt: skip
@click.argument("target")
@click.option("--question", "questions", multiple=True, help="May be repeated.")
@click.option("--context", type=click.Path(path_type=Path), help="File of the text.")
@click.option("--input", "source", help="Questions with contexts: SQuAD's JSON, csv, tsv, jsonl, parquet.")
@OUTPUT
@RAY
@click.option(
    "--top-k", type=click.IntRange(1, 100), default=1, show_default=True, help="Number of answers per question."
)
@click.option("--no-answer-threshold", type=float, help="Give no answer if the log-odds of no answer against the best span "
              "exceed this number (default: the model's threshold).")  # fmt: skip
@click.option("--page", type=click.Path(path_type=Path), help="HTML page of the answers to --input in their contexts, "
              "wrong ones first.")  # fmt: skip
@reading_options(on_error="skip")
@FORCE
@model_options
def command(
    *,
    target: str,
    questions: tuple[str, ...],
    context: Path | None,
    source: str | None,
    output: str | None,
    ray: str | None,
    top_k: int,
    no_answer_threshold: float | None,
    page: Path | None,
    reading: Reading,
    force: bool,
    **where: Any,
) -> Result:
    if bool(questions) == bool(source) or bool(questions) != bool(context):
        raise UsageError(
            "give --question and --context, or --input", 'deploykit answer TARGET --question "..." --context FILE'
        )
    if bool(source) != bool(output or page):
        raise UsageError("--input and --output (or --page) go together", "name both")
    check_page("--page", page)
    if output is None:
        refuse_ray(ray)
    elif no_answer_threshold is not None and ray is not None:
        raise UsageError("--no-answer-threshold is not for --ray", "leave one out")
    if no_answer_threshold is not None and math.isnan(no_answer_threshold):
        raise UsageError("--no-answer-threshold is nan", "give a number")

    from deploykit.data.open_text import read_text
    from deploykit.data.texts import TextRow
    from deploykit.tasks.answering import answer_rows, answer_source
    from deploykit.tasks.opening import open_for
    from deploykit.tasks.question_answering.facts import as_text
    from deploykit.tasks.question_answering.page import write_page

    predictor: Any = open_for("question-answering", target, **where)
    if no_answer_threshold is not None:
        predictor = predictor.with_threshold(no_answer_threshold)
    try:
        if context is not None:
            reading.allow(str(context))
            text = read_text(context, reading.encoding)
            rows = [TextRow(f"question {i}", as_text(q, text), None) for i, q in enumerate(questions, start=1)]
            records = [row.to_json() for row in answer_rows(predictor, rows, top_k)]
            lines = [_line(record) if len(records) == 1 else f"{record['text']}\n{_line(record)}" for record in records]
            remedy = "give another question or another context"
            code = failed_texts(records, stop=reading.on_error == "stop", remedy=remedy)
            return {"results": records}, "\n".join(lines), code
        assert source is not None
        record: dict[str, Any] = {}
        problems: tuple[str, ...] = ()
        lines = []
        if output is not None:
            done = answer_all(
                partial(answer_source, columns={}, generation=top_k), predictor, target, source, output,
                where=where if no_answer_threshold is None else {**where, "no_answer_threshold": no_answer_threshold},
                ray=ray, reading=reading, force=force, of_answers=top_k, rows="questions",
            )  # fmt: skip
            record |= answered_record(output, done)
            problems = done.problems
            lines.append(f"{output}: {done.rows:,} rows" + (f"; {done.errors:,} have an error" if done.errors else ""))
        if page is not None:
            with progress_bar("questions") as progress:
                shown = write_page(predictor, target, source, page, reading=reading, progress=progress)
            record |= {"page": str(page), "questions": shown}
            lines.append(f"{page}: {shown:,} questions")
    finally:
        predictor.close()
    return record, "\n".join(lines), failed_rows(problems)


def _line(record: dict[str, Any]) -> str:
    if "error" in record:
        return f"{record['origin']}: {record['error']}"
    shown = record.get("answers") or [record]
    if not record["answer"]:
        shown = [record, *record.get("answers", [])]
    return "\n".join(
        f"{span['score']:.4f}  {span['start']:>7}-{span['end']:<7}  {span['answer'] or '(no answer)'}" for span in shown
    )
