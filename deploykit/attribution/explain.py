"""Attributions by occlusion, and a check of any attributions by deletion."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from deploykit.attribution.words import Span
from deploykit.errors import MissingDependencyError, UsageError

SHARES = (0.0, 0.1, 0.2, 0.3, 0.5)
"""Shares of the words that the deletion check removes."""
_RANDOM_ORDERS = 5


Measure = Literal["log-odds", "number", "log-probability", "similarity"]
"""Measures whose differences are weights: the log-odds of a label or span, the number of a regression, the log-probability of a
text, or the similarity of another text to it (1: the same)."""


class ExplainedText(Protocol):
    """A text and a model's answer to it."""

    text: str
    words: Sequence[Span]
    """The words or sentences that may be removed, as positions in ``text``."""
    answer: str
    measure: Measure
    is_label: bool
    """Whether other texts may have the same answer."""

    def values(self, removed: Sequence[Collection[int]]) -> NDArray[np.float64]:
        """Return the ``measure`` of the same answer for each set of words to remove."""

    def score(self, value: float) -> float:
        """Return the number to display for a value: the probability of log-odds, or for a text the geometric mean probability of its
        tokens."""


@runtime_checkable
class Differentiable(Protocol):
    """An explained text of a model whose gradients are known."""

    def gradients(self) -> list[float]:
        """Return each word's share of the value, by integrated gradients."""


@dataclass(frozen=True)
class Word:
    """A word, or sentence, at ``text[start:end]``. ``weight``: by how much it raises the answer's ``measure``."""

    text: str
    start: int
    end: int
    weight: float


@dataclass(frozen=True)
class Deletion:
    """The effect of removing words on the answer's ``score``.

    ``top`` is without the ``shares`` of the words with the highest weights, ``random`` the mean without as many random
    words.
    """

    shares: tuple[float, ...]
    top: tuple[float, ...]
    random: tuple[float, ...]

    @property
    def gain(self) -> float:
        """The mean of ``random`` - ``top``: above 0 if the words with the highest weights move the answer most."""
        return float(np.mean(np.subtract(self.random, self.top)[1:]))


@dataclass(frozen=True)
class Explanation:
    """Why a model answers ``answer`` to ``text``: the weight of each word.

    ``score`` is the answer's probability (of a text, the geometric mean of its tokens'), the number of a regression, or
    the similarity 1. ``method`` is "integrated gradients" or "occlusion".
    """

    text: str
    answer: str
    score: float
    words: tuple[Word, ...]
    method: str
    measure: Measure = "log-odds"
    is_label: bool = True
    deletion: Deletion | None = None


def explain(explained: ExplainedText, method: str, *, check: bool, seed: int = 0) -> Explanation:
    """Explain one answer by ``method``: "gradients", or "occlusion" (the loss when the word is removed)."""
    if method == "gradients":
        assert isinstance(explained, Differentiable)
        base, weights = float(explained.values([()])[0]), explained.gradients()
    else:
        base, *others = explained.values([(), *((i,) for i in range(len(explained.words)))]).tolist()
        weights = [base - other for other in others]
    words = tuple(
        Word(explained.text[first:last], first, last, float(weight))
        for (first, last), weight in zip(explained.words, weights)
    )
    deletion = _deletion(explained, weights, seed) if check and words else None
    named = "integrated gradients" if method == "gradients" else "occlusion"
    return Explanation(
        explained.text, explained.answer, explained.score(base), words, named, explained.measure, explained.is_label,
        deletion,
    )  # fmt: skip


def _deletion(explained: ExplainedText, weights: Sequence[float], seed: int) -> Deletion:
    random = np.random.default_rng(seed)
    orders = [np.argsort(-np.asarray(weights), kind="stable")]
    orders += [random.permutation(len(weights)) for _ in range(_RANDOM_ORDERS)]
    removed = [tuple(sorted(order[: math.ceil(share * len(weights))])) for order in orders for share in SHARES]
    different = list(dict.fromkeys(removed))  # all without nothing, and those of short texts
    scores = dict(zip(different, map(explained.score, explained.values(different).tolist())))
    curves = np.array([scores[words] for words in removed]).reshape(len(orders), len(SHARES))
    return Deletion(SHARES, tuple(curves[0].tolist()), tuple(curves[1:].mean(axis=0).tolist()))


def mean_deletion(explanations: Sequence[Explanation]) -> Deletion | None:
    """Return the mean curves of the explanations that were checked; None if none was."""
    checked = [explanation.deletion for explanation in explanations if explanation.deletion is not None]
    if not checked:
        return None
    top, random = (np.mean([getattr(d, name) for d in checked], axis=0).tolist() for name in ("top", "random"))
    return Deletion(SHARES, tuple(top), tuple(random))


def words_of_answers(explanations: Sequence[Explanation], most: int = 20) -> dict[str, list[tuple[str, float, int]]]:
    """Return the words that push most towards each answer: word, mean weight, and number of occurrences.

    The answers are labels, "a higher number" and "a lower number", or "any answer" if each text has its own. The order is
    by the sum of weights / (occurrences + 2), so that a rare word is not first by chance.
    """
    found: dict[tuple[str, int], dict[str, list[float]]] = {}
    for explanation in explanations:
        for group in _groups(explanation):
            weights = found.setdefault(group, {})
            for word in explanation.words:
                if any(character.isalnum() for character in word.text):
                    weights.setdefault(word.text.lower(), []).append(word.weight)
    return {
        answer: [
            (word, float(np.mean(values)), len(values))
            for word, values in sorted(words.items(), key=lambda item: -sign * sum(item[1]) / (len(item[1]) + 2))[:most]
            if sign * sum(values) > 0
        ]
        for (answer, sign), words in sorted(found.items())
    }


def _groups(explanation: Explanation) -> list[tuple[str, int]]:
    """Return the names under which an explanation's words are summed, and the sign of the weights that count."""
    if explanation.measure == "number":
        return [("a higher number", 1), ("a lower number", -1)]
    return [(explanation.answer if explanation.is_label else "any answer", 1)]


def check_gradients(*, is_checkpoint: bool) -> None:
    """Raise UsageError if the model is not a checkpoint, MissingDependencyError without captum: gradients need both."""
    if not is_checkpoint:
        raise UsageError("gradients need a checkpoint", "give the checkpoint, or --method occlusion")
    try:
        import captum  # noqa: F401
    except ImportError:
        raise MissingDependencyError(
            "captum, which computes gradients, is not installed", "pip install 'deploykit[explain]'"
        ) from None


def log_odds(probability: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return ln p/(1 - p), of probabilities clipped to 1e-7 from 0 and 1."""
    clipped = np.clip(probability, 1e-7, 1 - 1e-7)
    return np.asarray(np.log(clipped) - np.log1p(-clipped), np.float64)


def probability(value: float) -> float:
    """Return the probability with these log-odds."""
    return 1 / (1 + math.exp(-value)) if value >= 0 else 1 - 1 / (1 + math.exp(value))
