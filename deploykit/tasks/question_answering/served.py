"""Answer questions with a model on a running server, through the same interface as in this process."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from deploykit.errors import DataError, UsageError
from deploykit.runtime.finite import NoNumberError
from deploykit.runtime.served import DEFAULT_URL, ServedModel
from deploykit.tasks.question_answering.facts import QuestionAnswering, as_text, from_text
from deploykit.tasks.question_answering.predictor import Pair, context_problem
from deploykit.tasks.question_answering.spans import Found, Span
from deploykit.tasks.registry import task_of

_OUTPUTS = ("ANSWER", "SCORE", "NONE", "ERROR", "TOP_ANSWERS", "TOP_STARTS", "TOP_ENDS", "TOP_SCORES")


class ServedAnswerer(ServedModel):
    """The answerer ``name`` on the Triton server at ``url``; satisfies ``TextAnswerer``.

    Takes the options of ``ServedModel``.
    """

    def __init__(self, name: str, url: str = DEFAULT_URL, **options: Any) -> None:
        super().__init__(name, url, **options)
        if not isinstance(self.facts, QuestionAnswering):
            self.close()
            raise UsageError(
                f"{name} {task_of(self.facts).does}, it does not answer questions", "use deploykit predict"
            )
        self.task: QuestionAnswering = self.facts
        self._parameters: dict[str, Any] = {}

    def with_threshold(self, threshold: float) -> ServedAnswerer:
        """Return an answerer with another threshold for no answer, over the same connections; see ``Answerer``."""
        other = copy.copy(self)
        other.task = replace(self.task, no_answer_threshold=threshold)
        other._parameters = {"no_answer_threshold": str(threshold)}
        return other

    def answer(self, question: str, context: str, *, top_k: int = 1) -> list[Span]:
        """Return up to ``top_k`` answers, best first; see ``Answerer``."""
        (found,) = self.try_all([(question, context)], top_k=top_k)
        if isinstance(found, DataError):
            raise found
        return found.answers(self.task.no_answer_threshold, top_k)

    def try_all(
        self, pairs: Sequence[Pair], *, top_k: int = 1, progress: Callable[[int, int], None] = lambda done, of: None
    ) -> list[Found | DataError]:
        """Answer every pair, in order; see ``Answerer``."""

        def infer(chunk: list[bytes]) -> list[Found | DataError]:
            questions, contexts = zip(*(from_text(text.decode()) for text in chunk))
            sent = [
                "" if row and context == contexts[row - 1] else context  # empty: the context of the row before
                for row, context in enumerate(contexts)
            ]
            inputs = {"QUESTION": [q.encode() for q in questions], "CONTEXT": [c.encode() for c in sent]}
            outputs = dict(zip(_OUTPUTS, self._infer(inputs, _OUTPUTS, {"top_k": top_k, **self._parameters})))
            return [_found({name: array[row] for name, array in outputs.items()}) for row in range(len(chunk))]

        texts = [as_text(question, context) for question, context in pairs]
        problems = [context_problem(context) for _, context in pairs]
        good = [text for text, problem in zip(texts, problems) if problem is None]
        answers = iter(self._rows(good, infer, lambda error: DataError(error, "ask about another text")))
        results = [next(answers) if problem is None else problem for problem in problems]
        progress(len(pairs), len(pairs))
        return results


def _found(row: dict[str, Any]) -> Found | DataError:
    """Rebuild the server's result from a row of each output."""
    error = row["ERROR"].reshape(-1)[0].decode()
    if error:
        refused = NoNumberError()
        return refused if error.startswith(refused.message) else DataError(error, "ask about another text")
    tops = (row[name].reshape(-1) for name in ("TOP_ANSWERS", "TOP_STARTS", "TOP_ENDS", "TOP_SCORES"))
    spans = tuple(
        Span(text.decode(), int(start), int(end), float(score)) for text, start, end, score in zip(*tops) if text
    )
    unanswered = not row["ANSWER"].reshape(-1)[0]
    score = float(row["SCORE"].reshape(-1)[0])
    return Found(spans, float(row["NONE"].reshape(-1)[0]), score if unanswered else 0.0)
