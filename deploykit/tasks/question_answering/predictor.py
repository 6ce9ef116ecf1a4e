"""Answer questions in this process with spans of their contexts."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from deploykit.errors import DataError
from deploykit.runtime.batching import batches, padded_types
from deploykit.runtime.engines.protocol import Engine
from deploykit.runtime.tracing import stage
from deploykit.tasks.question_answering.facts import MAX_CONTEXT_CHARS, QuestionAnswering
from deploykit.tasks.question_answering.spans import Candidates, Collector, Found, Span, candidates
from deploykit.tasks.question_answering.windows import PairTokenizer, Window
from deploykit.text import is_blank, printable

_WINDOWS_AT_ONCE = 256
_MORE_CANDIDATES = 10  # extra candidates, because some become equal when extended to whole words

Pair = tuple[str, str]
"""A question and its context."""
Logits = NDArray[np.float32]


class Reader(Protocol):
    """A function that runs a model. Takes inputs by name, int64 [windows, tokens]; returns start and end logits of that
    shape."""

    def __call__(self, inputs: dict[str, NDArray[np.int64]]) -> tuple[Logits, Logits]: ...


@dataclass
class _PendingQuestion:
    """Question number ``row`` in progress: its windows, how many of them wait, and whether all have been cut."""

    row: int
    collector: Collector
    windows: Iterator[Window]
    waiting: int = 0
    cut: bool = False


class Answerer:
    """The tokenizer and model of one answerer. Not for concurrent calls."""

    def __init__(
        self,
        task: QuestionAnswering,
        tokenizer: PairTokenizer,
        read: Reader,
        token_budget: int,
        *,
        buckets: bool = True,
    ) -> None:
        self.task = task
        self.tokenizer = tokenizer
        self._read = read
        self._token_budget = token_budget
        self._buckets = buckets

    def with_threshold(self, threshold: float) -> Answerer:
        """Return an answerer with the same model and another threshold for no answer (log-odds)."""
        other = copy.copy(self)
        other.task = replace(self.task, no_answer_threshold=threshold)
        return other

    def answer(self, question: str, context: str, *, top_k: int = 1) -> list[Span]:
        """Return up to ``top_k`` answers, best first; the first has an empty text if there is no answer.

        Raises DataError if the question cannot be answered, for example because it is too long.
        """
        (found,) = self.try_all([(question, context)], top_k=top_k)
        if isinstance(found, DataError):
            raise found
        return found.answers(self.task.no_answer_threshold, top_k)

    def find(self, pairs: Sequence[Pair], *, top_k: int = 1) -> list[Found]:
        """Answer every pair, in order. Raises DataError naming the first that is refused."""
        found = self.try_all(pairs, top_k=top_k)
        for number, result in enumerate(found):
            if isinstance(result, DataError):
                raise DataError(f"question {number}: {result.message}", result.remedy)
        return [result for result in found if isinstance(result, Found)]

    def try_all(
        self, pairs: Sequence[Pair], *, top_k: int = 1, progress: Callable[[int, int], None] = lambda done, of: None
    ) -> list[Found | DataError]:
        """Answer every pair, in order; a refused pair gets a DataError that says why.

        An answer does not depend on the other pairs. Windows are read ``_WINDOWS_AT_ONCE`` at a time, so that memory
        does not grow with the contexts' lengths. ``progress`` is called with (pairs done, number of pairs).
        """
        results: list[Found | DataError | None] = [None] * len(pairs)
        waiting: list[tuple[_PendingQuestion, Window]] = []
        done = 0

        def read() -> None:
            nonlocal done
            for (pending, window), found in zip(waiting, self._candidates([w for _, w in waiting], top_k)):
                pending.collector.add(window, found)
                pending.waiting -= 1
                if pending.cut and not pending.waiting:
                    results[pending.row] = pending.collector.result()
                    done += 1
            waiting.clear()
            progress(done, len(pairs))

        for item in self._pending(pairs, top_k):
            if isinstance(item, tuple):
                row, error = item
                results[row] = error
                done += 1
                continue
            for window in item.windows:
                if len(waiting) == _WINDOWS_AT_ONCE:
                    read()
                item.waiting += 1
                waiting.append((item, window))
            item.cut = True
        read()
        return [result for result in results if result is not None]

    def close(self) -> None:
        """Do nothing: the engine is freed with the object."""

    def _pending(self, pairs: Sequence[Pair], top_k: int) -> Iterator[_PendingQuestion | tuple[int, DataError]]:
        """Yield the windows of each pair. Pairs that share a context come together, so that it is tokenized once."""
        by_context: dict[str, list[int]] = {}
        for row, (_, text) in enumerate(pairs):
            by_context.setdefault(text, []).append(row)
        for text, rows in by_context.items():
            with stage("tokenize"):
                found = list(self._of_context(text, [(row, pairs[row][0]) for row in rows], top_k))
            yield from found

    def _of_context(
        self, text: str, questions: Sequence[tuple[int, str]], top_k: int
    ) -> Iterator[_PendingQuestion | tuple[int, DataError]]:
        """Yield the windows of each of the ``questions``, with their row numbers, about one context."""
        if (problem := context_problem(text)) is not None:
            yield from ((row, problem) for row, _ in questions)
            return
        context = self.tokenizer.context(printable(text))
        for row, question in questions:
            try:
                if is_blank(printable(question)):
                    raise DataError("the question is empty", "give a question")
                tokens = self.tokenizer.question(printable(question))
                self.tokenizer.check(tokens, context)
            except DataError as error:
                yield row, error
                continue
            yield _PendingQuestion(row, Collector(context, self.task, top_k), self.tokenizer.windows(tokens, context))

    def _candidates(self, windows: Sequence[Window], top_k: int) -> list[Candidates]:
        found: list[Candidates | None] = [None] * len(windows)
        for rows, start, end in self.logits(windows):
            with stage("spans"):
                chosen = candidates(
                    start, end, [windows[row] for row in rows], most=2 * top_k + _MORE_CANDIDATES,
                    longest=self.task.max_answer_length, with_none=self.tokenizer.marks_no_answer,
                )  # fmt: skip
            for row, of_window in zip(rows, chosen):
                found[row] = of_window
        return [of_window for of_window in found if of_window is not None]

    def logits(self, windows: Sequence[Window]) -> Iterator[tuple[NDArray[np.int64], Logits, Logits]]:
        """Run the windows in batches. Yield each batch's rows, and start and end logits, float32 [rows, padded
        length]."""
        task = self.task
        for batch in batches(
            [w.ids for w in windows], task.pad_token_id, max_length=task.max_length, token_budget=self._token_budget,
            buckets=self._buckets,
        ):  # fmt: skip
            with stage("encode"):
                start, end = self._read(with_types(task, batch.input_ids, batch.attention_mask, windows, batch.rows))
            yield batch.rows, start, end


def with_types(
    task: QuestionAnswering, input_ids: NDArray[np.int64], attention_mask: NDArray[np.int64],
    windows: Sequence[Window], rows: Sequence[int] | NDArray[np.int64],
) -> dict[str, NDArray[np.int64]]:  # fmt: skip
    """Return the graph's inputs for ``rows`` of the windows, with token types if the graph has them."""
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
    if task.token_types:
        inputs["token_type_ids"] = padded_types(input_ids, [window.types for window in windows], rows)
    return inputs


def context_problem(context: str) -> DataError | None:
    """Return why a context cannot be read, or None."""
    if len(context) > MAX_CONTEXT_CHARS:
        return DataError(
            f"the context has {len(context):,} characters, more than {MAX_CONTEXT_CHARS:,}",
            "split it, and ask about each part",
        )
    if is_blank(context):
        return DataError("the context is empty", "give a text that may contain the answer")
    return None


def load_answerer(folder: Path, task: QuestionAnswering, engine: Engine, *, token_budget: int = 0) -> Answerer:
    """Create an answerer from a folder with a tokenizer.json and a loaded engine.

    ``token_budget`` limits the tokens of one run of the engine (padding counts if the engine computes it); 0 is the engine's own default.
    """

    def read(inputs: dict[str, NDArray[np.int64]]) -> tuple[Logits, Logits]:
        start, end = engine.run(inputs)
        return start, end

    tokenizer = PairTokenizer.load(folder / "tokenizer.json", task)
    return Answerer(task, tokenizer, read, token_budget or engine.token_budget, buckets=engine.computes_padding)


class TextAnswerer(Protocol):
    """An answerer in this process or on a server."""

    task: QuestionAnswering

    def with_threshold(self, threshold: float) -> TextAnswerer:
        """Return an answerer with another threshold for no answer; see ``Answerer``."""

    def answer(self, question: str, context: str, *, top_k: int = 1) -> list[Span]:
        """Return up to ``top_k`` answers, best first; see ``Answerer``."""

    def try_all(
        self, pairs: Sequence[Pair], *, top_k: int = 1, progress: Callable[[int, int], None] = ...
    ) -> list[Found | DataError]:
        """Answer every pair; see ``Answerer``."""

    def close(self) -> None:
        """Release connections."""
