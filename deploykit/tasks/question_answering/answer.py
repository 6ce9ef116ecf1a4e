"""Answers for many questions, from any answerer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from deploykit import artifacts
from deploykit.data.answer_file import JSON_LINES, Answered, Line, answer_file, is_error, json_line, source_digest
from deploykit.data.texts import TextRow
from deploykit.errors import DataError, UsageError
from deploykit.tasks.question_answering.facts import as_text, from_text
from deploykit.tasks.question_answering.predictor import TextAnswerer
from deploykit.tasks.question_answering.rows import read_rows
from deploykit.tasks.question_answering.spans import Span


def answers(predictor: TextAnswerer, rows: Sequence[TextRow], top_k: int = 1) -> list[dict[str, Any]]:
    """Return a record for each row, whose text ``as_text`` made: origin, question, answer, start, end and score; or
    origin and error. With more than one ``top_k`` also answers, best first, each with its place and score."""
    pairs = [from_text(row.text) for row in rows if row.text is not None]
    found = iter(zip(pairs, predictor.try_all(pairs, top_k=top_k)))
    records: list[dict[str, Any]] = []
    for row in rows:
        if row.text is None:
            records.append({"origin": row.origin, "error": row.problem})
            continue
        (question, _), result = next(found)
        if isinstance(result, DataError):
            records.append({"origin": row.origin, "question": question, "error": result.message})
            continue
        best = result.decide(predictor.task.no_answer_threshold)
        record = {"origin": row.origin, "question": question, **_fields(best)}
        if top_k > 1:
            record["answers"] = [_fields(span) for span in result.spans]
        records.append(record)
    return records


def answer_questions(
    predictor: TextAnswerer,
    source: str,
    out: Path,
    *,
    identity: str,
    top_k: int = 1,
    encoding: str | None = None,
    force: bool = False,
    progress: Callable[[int, int], None],
) -> Answered:
    """Write an answer for each row of ``source`` to ``out``, one JSON object a line; see ``answer_file``.

    ``identity`` stands for the model: with it and the source, an unfinished file is continued.
    """
    if out.suffix.lower() not in JSON_LINES:
        raise UsageError(f"--output {out}: answers are written as JSON lines", "give it a name that ends in .jsonl")

    def rows() -> Iterator[TextRow]:
        for row in read_rows(source, encoding=encoding):
            missing = next((name for name in ("question", "context") if getattr(row, name) is None), None)
            if row.question is None or row.context is None:
                yield TextRow(row.origin, None, f"the {missing} is missing")
            else:
                yield TextRow(row.origin, as_text(row.question, row.context), None)

    def answer(part: Sequence[TextRow]) -> list[Line]:
        return [json_line(record) for record in answers(predictor, part, top_k)]

    key = artifacts.digest_of(source_digest(source), top_k, encoding, identity)
    return answer_file(rows, answer, out, key=key, failed=is_error, force=force, progress=progress)


def _fields(span: Span) -> dict[str, Any]:
    return {"answer": span.text, "start": span.start, "end": span.end, "score": round(span.score, 6)}
