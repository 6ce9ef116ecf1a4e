"""Explain answers to questions: find the words of question and context that led to the answer."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from deploykit.attribution.explain import ExplainedText, Measure, log_odds, probability
from deploykit.attribution.words import Span, Unit, split_units, without
from deploykit.errors import DataError, UsageError
from deploykit.tasks.question_answering.facts import from_text
from deploykit.tasks.question_answering.predictor import TextAnswerer
from deploykit.text import printable

_BETWEEN = " | "
_CANDIDATES = 20


class AnsweredQuestion:
    """A question, its context, and an answer. The words of the answer itself stay."""

    measure: Measure = "log-odds"
    is_label = False

    def __init__(self, predictor: TextAnswerer, text: str, answer: str | None, unit: Unit) -> None:
        """``answer`` is the answer to explain, None for the best. Raises DataError if the model refuses the question or finds no
        such answer."""
        self._predictor = predictor
        self._question, self._context = map(printable, from_text(text))
        (found,) = predictor.try_all([(self._question, self._context)], top_k=_CANDIDATES)
        if isinstance(found, DataError):
            raise found
        if answer is None:
            span = found.decide(predictor.task.no_answer_threshold)
            if not span.text:
                raise DataError("the model finds no answer, so there is nothing to explain", "ask another question")
        else:
            spans = [span for span in found.spans if span.text.lower() == answer.lower()]
            if not spans:
                raise DataError(
                    f"{answer!r} is not among the {_CANDIDATES} best answers of the model",
                    f"give one of them: {', '.join(span.text for span in found.spans[:5])}",
                )
            span = spans[0]
        self.answer = span.text
        self._begin = len(self._question) + len(_BETWEEN)
        self.text = self._question + _BETWEEN + self._context
        around = _around(self._context, split_units(self._context, unit), (span.start, span.end))
        shifted = [(a + self._begin, b + self._begin) for a, b in around]
        self.words: Sequence[Span] = [*split_units(self._question, unit), *shifted]

    def values(self, removed: Sequence[Collection[int]]) -> NDArray[np.float64]:
        found = self._predictor.try_all([self._without(words) for words in removed], top_k=_CANDIDATES)
        probabilities = [
            0.0
            if isinstance(one, DataError)
            else sum(s.score for s in one.spans if s.text.lower() == self.answer.lower())
            for one in found
        ]
        return log_odds(np.array(probabilities))

    def score(self, value: float) -> float:
        return probability(value)

    def _without(self, removed: Collection[int]) -> tuple[str, str]:
        gone = [self.words[i] for i in removed]
        question = without(self._question, [word for word in gone if word[0] < self._begin])
        context = [(a - self._begin, b - self._begin) for a, b in gone if a >= self._begin]
        return question, without(self._context, context)


def _around(context: str, units: Sequence[Span], answer: Span) -> Iterator[Span]:
    """Yield the parts of ``units`` that lie outside of the answer."""
    for a, b in units:
        for first, last in ((a, min(b, answer[0])), (max(a, answer[1]), b)):
            part = context[first:last]
            if part.strip():
                yield first + len(part) - len(part.lstrip()), last - len(part) + len(part.rstrip())


def explained_text(predictor: TextAnswerer, text: str, answer: str | None, method: str, unit: Unit) -> ExplainedText:
    """Return a question with its context to be explained by occlusion. Raises UsageError for gradients."""
    if method == "gradients":
        raise UsageError("only occlusion explains answers to questions", "leave out --method")
    return AnsweredQuestion(predictor, text, answer, unit)
