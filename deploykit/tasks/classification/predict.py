"""Labels for many rows, from any classifier."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from deploykit import artifacts
from deploykit.data.answer_file import (
    JSON_LINES,
    Answered,
    Line,
    answer_file,
    is_error,
    json_line,
    source_digest,
    too_long,
)
from deploykit.data.texts import TextRow, read_texts
from deploykit.errors import DataError, UsageError
from deploykit.tasks.classification.predictor import TextClassifier


def answers(predictor: TextClassifier, rows: Sequence[TextRow]) -> list[dict[str, Any]]:
    """A record for each row: origin, text, label, score and scores; or origin and error.

    ``score`` is the answer's probability (multi-label: the highest of any label).
    """
    problems = [row.problem or too_long(row.text) for row in rows]
    good = [row.text for row, problem in zip(rows, problems) if problem is None and row.text is not None]
    scores = predictor.scores(good) if good else np.empty((0, len(predictor.task.labels)), np.float32)
    answered = iter(zip(predictor.task.decide(scores) if good else [], scores))
    records: list[dict[str, Any]] = []
    for row, problem in zip(rows, problems):
        if problem is not None:
            records.append({"origin": row.origin, "error": problem})
            continue
        label, row_scores = next(answered)
        records.append(
            {
                "origin": row.origin,
                "text": row.text,
                "label": label,
                "score": round(float(row_scores.max()), 6),
                "scores": {name: round(float(s), 6) for name, s in zip(predictor.task.labels, row_scores)},
            }
        )
    return records


def predict_file(
    predictor: TextClassifier,
    source: str,
    out: Path,
    *,
    identity: str,
    text_columns: Sequence[str] = (),
    encoding: str | None = None,
    force: bool = False,
    progress: Callable[[int, int], None],
) -> Answered:
    """Write an answer for each row of ``source`` to ``out``, one JSON object a line; see ``answer_file``.

    ``identity`` stands for the model: with it, the source and the columns, an unfinished file is continued.
    """
    if out.suffix.lower() not in JSON_LINES:
        raise UsageError(f"--output {out}: answers are written as JSON lines", "give it a name that ends in .jsonl")
    columns = _columns(source, text_columns, predictor.task.text_columns)
    separator = predictor.task.text_separator

    def rows() -> Iterator[TextRow]:
        return read_texts(source, columns, separator, encoding=encoding)

    def answer(part: Sequence[TextRow]) -> list[Line]:
        return [json_line(record) for record in answers(predictor, part)]

    key = artifacts.digest_of(source_digest(source), columns, separator, encoding, identity)
    return answer_file(rows, answer, out, key=key, failed=is_error, force=force, progress=progress)


def _columns(source: str, given: Sequence[str], trained: Sequence[str]) -> tuple[str, ...]:
    """The columns asked for; else those the model was trained on, if the source has them; else detected."""
    if given:
        return tuple(given)
    try:
        next(iter(read_texts(source, trained)), None)
    except DataError:
        return ()
    return tuple(trained)
