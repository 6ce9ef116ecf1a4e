"""Measure without labels what a form of an answerer loses against fp32. Few questions suffice, because only answers that fp32
prefers clearly count."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from deploykit.errors import DataError
from deploykit.runtime.finite import NoNumberError
from deploykit.tasks.question_answering.facts import QuestionAnswering
from deploykit.tasks.question_answering.metrics import scores
from deploykit.tasks.question_answering.spans import Found

COMPARED = 20
"""Answers of fp32 whose probabilities are compared; another answer has the probability 0."""
_MOST_ODDS = 50.0
_WRONG = "\ufffd"
"""The answer of a form that computes no number: even where fp32 finds no answer, it is wrong."""


def lost_points(
    task: QuestionAnswering, expected: Sequence[Found | DataError], found: Sequence[Found | DataError]
) -> float:
    """Return the points of F1 that the answers ``found`` are expected to lose against fp32's, ``expected``.

    An answer costs the probability by which fp32 prefers its own answer, times 1 minus the F1 of both. "No answer" counts as an
    answer. Questions that fp32 refuses cost nothing.
    """
    theirs, ours, margins = [], [], []
    for right, result in zip(expected, found):
        if not isinstance(right, Found):
            continue
        own, preferred = right.decide(task.no_answer_threshold).text, preferences(right, task.no_answer_threshold)
        margin = preferred[own.lower()]
        if isinstance(result, NoNumberError):
            answer = _WRONG
        else:
            answer = result.decide(task.no_answer_threshold).text if isinstance(result, Found) else ""
            margin -= preferred.get(answer.lower(), 0.0)
        ours.append(answer)
        theirs.append((own,))
        margins.append(margin)
    _, overlap = scores(task, ours, theirs)
    return 100 * float((np.array(margins) * (1 - overlap)).sum()) / max(len(expected), 1)


def preferences(found: Found, threshold: float | None) -> dict[str, float]:
    """Return answers in lower case ("" is no answer) and their probabilities. The answer that ``found`` decides for has the
    highest, as "no answer" is as likely as the first span if its log-odds are ``threshold``."""
    if not found.spans:
        return {"": 1.0}
    none = 0.0
    if threshold is not None:
        none = found.spans[0].score * math.exp(min(max(found.none - threshold, -_MOST_ODDS), _MOST_ODDS))
    total = 1 - found.none_score + none
    return {"": none / total, **{span.text.lower(): span.score / total for span in found.spans}}
