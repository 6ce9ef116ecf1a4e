"""Questions of an answerer to explain: what of question and context the answer comes from."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import NDArray

from deploykit.attribution.explain import ExplainedText, log_odds
from deploykit.attribution.words import Span, split_words, without
from deploykit.errors import DataError, UsageError
from deploykit.tasks.question_answering.facts import from_text
from deploykit.tasks.question_answering.predictor import TextAnswerer
from deploykit.text import printable

_BETWEEN = " | "
_CANDIDATES = 20


class AnsweredQuestion:
    """A question, its context, and the model's answer. The words of the answer itself stay."""

    is_number = False

    def __init__(self, predictor: TextAnswerer, text: str) -> None:
        """Raises DataError if the model refuses the question, or finds no answer."""
        self._predictor = predictor
        self._question, self._context = map(printable, from_text(text))
        (found,) = predictor.try_all([(self._question, self._context)])
        if isinstance(found, DataError):
            raise found
        span = found.decide(predictor.task.no_answer_threshold)
        if not span.text:
            raise DataError("the model finds no answer, so there is none to explain", "ask another question")
        self.answer = span.text
        self._begin = len(self._question) + len(_BETWEEN)
        self.text = self._question + _BETWEEN + self._context
        shifted = [(a + self._begin, b + self._begin) for a, b in split_words(self._context)
                   if b <= span.start or a >= span.end]  # fmt: skip
        self.words: Sequence[Span] = [*split_words(self._question), *shifted]

    def values(self, removed: Sequence[Collection[int]]) -> NDArray[np.float64]:
        found = self._predictor.try_all([self._without(words) for words in removed], top_k=_CANDIDATES)
        probabilities = [
            0.0
            if isinstance(one, DataError)
            else sum(s.score for s in one.spans if s.text.lower() == self.answer.lower())
            for one in found
        ]
        return log_odds(np.array(probabilities))

    def _without(self, removed: Collection[int]) -> tuple[str, str]:
        gone = [self.words[i] for i in removed]
        question = without(self._question, [word for word in gone if word[0] < self._begin])
        context = [(a - self._begin, b - self._begin) for a, b in gone if a >= self._begin]
        return question, without(self._context, context)


def explained_text(predictor: TextAnswerer, text: str, answer: str | None, method: str) -> ExplainedText:
    """Return a question with its context to be explained by occlusion. Raises UsageError for gradients or a label."""
    if answer is not None:
        raise UsageError("--label is for classifiers", "leave it out")
    if method == "gradients":
        raise UsageError("answers to questions are explained by occlusion", "leave out --method")
    return AnsweredQuestion(predictor, text)
