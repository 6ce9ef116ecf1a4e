"""Choose answers from the logits of windows, as transformers' QuestionAnsweringPipeline does.

Within a window, a span's probability is the probability of its first token as start times that of its last as end. Each
is a softmax over the context's tokens and the window's first token, which stands for "no answer". Spans with the same
text, ignoring case and outer white space, are one answer: their probabilities are summed over positions and windows, and
the position is the first one found. The probability of no answer is the lowest of all windows.

In the pipeline a word with and without the space before it are different answers. With tokenizers that make a token of the space
(SentencePiece's), the start of a window then decides to which of them a word's probability goes.

Source: transformers 4.57, pipelines/question_answering.py (transformers 5 has no such pipeline).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from deploykit.errors import DataError
from deploykit.runtime.finite import NoNumberError
from deploykit.tasks.question_answering.facts import QuestionAnswering
from deploykit.tasks.question_answering.windows import EncodedContext, Window

_LEAST = 1e-300
"""Replaces a probability of 0 in logarithms."""


@dataclass(frozen=True)
class Span:
    """An answer, its position in the context in code points, and its share of the probability of all kept answers.

    No answer is the text "" from 0 to 0.
    """

    text: str
    start: int
    end: int
    score: float


@dataclass(frozen=True)
class Found:
    """The ``spans`` of a context, best first. ``none`` are the log-odds of no answer against the first span,
    ``none_score`` is its share of the probability of all kept answers."""

    spans: tuple[Span, ...]
    none: float
    none_score: float

    def decide(self, threshold: float | None) -> Span:
        """Return the best span, or an empty one if the log-odds of no answer exceed ``threshold``."""
        if not self.spans or (threshold is not None and self.none > threshold):
            return Span("", 0, 0, self.none_score)
        return self.spans[0]

    def answers(self, threshold: float | None, top_k: int) -> list[Span]:
        """Return up to ``top_k`` spans, best first, after an empty one if there is no answer."""
        decided = self.decide(threshold)
        return [*([] if decided.text else [decided]), *self.spans][:top_k]


@dataclass(frozen=True)
class Candidates:
    """The best spans of one window: first and last token, counted from the window's first, and probability.

    ``finite``: all logits of the window are numbers; otherwise it has no spans.
    """

    first: NDArray[np.int64]
    last: NDArray[np.int64]
    probability: NDArray[np.float64]
    none: float
    finite: bool = True


def candidates(
    start_logits: NDArray[np.float32],
    end_logits: NDArray[np.float32],
    windows: Sequence[Window],
    *,
    most: int,
    longest: int,
    with_none: bool,
) -> list[Candidates]:
    """Return the ``most`` best spans of at most ``longest`` tokens of each window.

    Logits are float32 [windows, tokens], padded after a window's ids. ``with_none``: the first token stands for no
    answer.
    """
    rows, length = start_logits.shape
    positions = np.arange(length)
    at = np.array([w.at for w in windows])[:, None]
    size = np.array([w.end - w.begin for w in windows])[:, None]
    inside = (positions >= at) & (positions < at + size)
    allowed = inside | ((positions == 0) & with_none)
    start, end = (_softmax(logits, allowed) for logits in (start_logits, end_logits))
    finite = ~np.isnan(start[:, 0] + end[:, 0])
    none = start[:, 0] * end[:, 0] if with_none else np.zeros(rows)
    start, end = start * inside, end * inside
    longest = min(longest, length)
    padded = np.concatenate([end, np.zeros((rows, longest))], axis=1)
    ends = np.lib.stride_tricks.sliding_window_view(padded, longest, axis=1)[:, :length]
    # Other spans than the best of their first token count only for the tokens whose best is among the ``most`` best.
    firsts = np.sort(_highest(start * ends.max(axis=2), min(most, length)), axis=1)
    products = (np.take_along_axis(start, firsts, axis=1)[:, :, None] * ends[np.arange(rows)[:, None], firsts]).reshape(
        rows, -1
    )
    best = _highest(products, min(most, products.shape[1]))
    probability = np.take_along_axis(products, best, axis=1)
    order = np.lexsort((best, -probability), axis=1)
    best, probability = (np.take_along_axis(a, order, axis=1) for a in (best, probability))
    first = np.take_along_axis(firsts, best // longest, axis=1)
    last = first + best % longest
    found = []
    for row in range(rows):
        kept = probability[row] > 0
        best_first, best_last, best_probability = (each[row][kept] for each in (first, last, probability))
        found.append(Candidates(best_first, best_last, best_probability, float(none[row]), bool(finite[row])))
    return found


def _highest(values: NDArray[np.float64], count: int) -> NDArray[np.int64]:
    """Return the columns of the ``count`` highest values of each row, in any order."""
    return np.argpartition(-values, count - 1, axis=1)[:, :count]


def _softmax(logits: NDArray[np.float32], allowed: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Return probabilities of the ``allowed`` tokens; NaN for a whole row where one of them has NaN or infinity, or all have -inf."""
    values = np.where(allowed, logits.astype(np.float64), -np.inf)
    highest = values.max(axis=1, keepdims=True)
    highest[~allowed.any(axis=1)] = 0.0  # a window may have no token of the context
    with np.errstate(invalid="ignore"):
        weights = np.exp(values - highest)
        return np.asarray(weights / np.maximum(weights.sum(axis=1, keepdims=True), _LEAST))


@dataclass
class Collector:
    """Merges the candidates of a context's windows, added in order, to the ``top_k`` best answers."""

    context: EncodedContext
    task: QuestionAnswering
    top_k: int
    _places: dict[str, tuple[int, int]] = field(default_factory=dict)
    _probability: dict[str, float] = field(default_factory=dict)
    _total: float = 0.0
    _none: float = 1.0
    _finite: bool = True

    def add(self, window: Window, found: Candidates) -> None:
        """Add a window's candidates. Without whole words only its ``top_k`` best are answers, as in the pipeline; the others
        count in the total of probability."""
        self._finite &= found.finite
        left = len(found.first) if self.task.whole_words else self.top_k
        self._none = min(self._none, found.none)
        for first, last, probability in zip(found.first, found.last, found.probability):
            shift = window.begin - window.at
            start, end = self.context.place(
                int(first) + shift, int(last) + shift, window.begin, window.end, whole_words=self.task.whole_words
            )
            if start >= end:
                continue
            self._total += float(probability)
            left -= 1
            if left < 0:
                continue
            key = self.context.text[start:end].lower()
            self._places.setdefault(key, (start, end))
            self._probability[key] = self._probability.get(key, 0.0) + float(probability)

    def result(self) -> Found | DataError:
        """Return the best answers, or an error if the model computed no number for one of the windows."""
        if not self._finite:
            return NoNumberError()
        ranked = sorted(self._probability, key=lambda key: -self._probability[key])
        total = self._total + (self._none if self.task.no_answer_threshold is not None else 0.0)
        total = max(total, _LEAST)
        spans = []
        for key in ranked[: self.top_k]:
            start, end = self._places[key]
            spans.append(Span(self.context.text[start:end], start, end, self._probability[key] / total))
        best = self._probability[ranked[0]] if ranked else 0.0
        # Round to float32, which a server sends, so that client and server decide the same.
        none = float(np.float32(np.log(max(self._none, _LEAST)) - np.log(max(best, _LEAST))))
        return Found(tuple(spans), none, self._none / total if self.task.no_answer_threshold is not None else 0.0)
