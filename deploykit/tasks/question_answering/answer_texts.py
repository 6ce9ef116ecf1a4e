"""Answer questions with any answerer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from deploykit.errors import DataError
from deploykit.tasks.protocol import Answer
from deploykit.tasks.question_answering.facts import from_text
from deploykit.tasks.question_answering.predictor import TextAnswerer
from deploykit.tasks.question_answering.spans import Span


def answer_texts(predictor: TextAnswerer, texts: Sequence[str], top_k: int | None = None) -> list[Answer]:
    """Return ``answer``, ``start``, ``end`` and ``score`` for each text that ``as_text`` made.

    If ``top_k`` is more than 1 also ``answers``, best first, each with position and score. Raises DataError for any
    other text, and for a question that cannot be answered.
    """
    pairs = [from_text(text) for text in texts]
    found = []
    for (question, _), result in zip(pairs, predictor.try_all(pairs, top_k=top_k or 1)):
        if isinstance(result, DataError):
            raise result
        best = result.decide(predictor.task.no_answer_threshold)
        fields = _fields(best)
        if top_k is not None and top_k > 1:
            fields["answers"] = [_fields(span) for span in result.spans]
        found.append(Answer(best.text, fields=fields, asked=question))
    return found


def _fields(span: Span) -> dict[str, Any]:
    return {"answer": span.text, "start": span.start, "end": span.end, "score": round(span.score, 6)}
