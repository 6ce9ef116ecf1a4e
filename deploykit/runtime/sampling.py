"""Sample the next token of an answer with numpy, by the options of a request.

The order of the rules is that of Hugging Face's ``generate``: penalties, temperature, top-k, top-p, min-p.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deploykit.errors import UsageError

Logits = NDArray[np.float32]

_MOST_ANSWERS = 128


@dataclass(frozen=True)
class Sampling:
    """Sampling options. ``temperature`` 0 is greedy search; ``top_k`` 0, ``top_p`` 1 and ``min_p`` 0 are off.

    ``repetition_penalty`` divides the positive logits of tokens in the prompt or the answer, and multiplies the
    negative ones. ``presence_penalty`` and ``frequency_penalty`` are subtracted from the logits of tokens in the
    answer, once and once per occurrence. ``stop``: texts that end an answer, and are cut off. ``n``: answers to each
    prompt.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    n: int = 1
    logprobs: int | None = None


_RANGES: Mapping[str, tuple[float, float]] = {
    "max_new_tokens": (1, 1_000_000),
    "temperature": (0, 100),
    "top_k": (0, 1_000_000_000),
    "top_p": (1e-6, 1),
    "min_p": (0, 1),
    "repetition_penalty": (0.01, 100),
    "presence_penalty": (-100, 100),
    "frequency_penalty": (-100, 100),
    "seed": (0, 2**63 - 1),
    "n": (1, _MOST_ANSWERS),
}
PARAMETERS = tuple(field.name for field in dataclasses.fields(Sampling))
"""Request parameters and command line options."""


def override(default: Sampling, given: Mapping[str, Any]) -> Sampling:
    """Return ``default`` with the ``given`` values. Raises UsageError naming the first that is unknown or out of
    range."""
    changes: dict[str, Any] = {}
    for name, value in given.items():
        if name not in PARAMETERS:
            raise UsageError(f"unknown parameter {name}", f"known ones: {', '.join(PARAMETERS)}")
        if name == "stop":
            texts = (value,) if isinstance(value, str) else tuple(value)
            if not all(isinstance(text, str) and text for text in texts):
                raise UsageError("stop holds an empty text", "give texts that end an answer")
            changes[name] = texts
            continue
        low, high = _RANGES[name]
        whole = isinstance(getattr(default, name), int)
        kinds = (int,) if whole else (int, float)
        if (
            isinstance(value, bool)
            or not isinstance(value, kinds)
            or not math.isfinite(value)
            or not low <= value <= high
        ):
            raise UsageError(
                f"{name} is {value!r}", f"give a {'whole number' if whole else 'number'} from {low:g} to {high:g}"
            )
        changes[name] = int(value) if whole else float(value)
    return dataclasses.replace(default, **changes)


class Sampler:
    """A sampler of one answer. Its random numbers depend only on seed, prompt and answer number, not on other rows."""

    def __init__(self, sampling: Sampling, prompt: Sequence[int], answer: int = 0) -> None:
        self._sampling = sampling
        self._seen = np.unique(np.asarray(prompt, np.int64))
        self._counts: dict[int, int] = {}
        self._random = np.random.default_rng((sampling.seed, answer, *prompt[-64:]))

    def choose(self, logits: Logits) -> int:
        """Return the next token's id. ``logits``: float32 [vocabulary]."""
        s = self._sampling
        changed = self._penalized(logits)
        token = int(changed.argmax()) if s.temperature == 0 else self._drawn(changed)
        self._counts[token] = self._counts.get(token, 0) + 1
        return token

    def _penalized(self, logits: Logits) -> Logits:
        s = self._sampling
        if s.repetition_penalty == 1 and s.presence_penalty == 0 and s.frequency_penalty == 0:
            return logits
        logits = logits.copy()
        answered = np.fromiter(self._counts, np.int64, len(self._counts))
        if s.repetition_penalty != 1:
            seen = np.union1d(self._seen, answered)
            values = logits[seen]
            logits[seen] = np.where(values < 0, values * s.repetition_penalty, values / s.repetition_penalty)
        if len(answered):
            counts = np.fromiter(self._counts.values(), np.float32, len(self._counts))
            logits[answered] -= s.presence_penalty + s.frequency_penalty * counts
        return logits

    def _drawn(self, logits: Logits) -> int:
        kept, probabilities = distribution(logits, self._sampling)
        # Draw from the cumulative sum: ``Generator.choice`` renormalizes and is slower.
        cumulative = np.cumsum(probabilities)
        index = int(np.searchsorted(cumulative, self._random.random() * cumulative[-1], side="right"))
        return int(kept[min(index, len(kept) - 1)])


def distribution(logits: Logits, sampling: Sampling) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return the tokens kept by temperature, top-k, top-p and min-p, most probable first, and their probabilities.

    Of equal logits the lower id comes first. Ids are int64 [kept], probabilities float64 [kept], with sum 1.
    """
    scaled = logits.astype(np.float64) / sampling.temperature
    if 0 < sampling.top_k < len(scaled):
        candidates = np.flatnonzero(scaled >= np.partition(scaled, -sampling.top_k)[-sampling.top_k])
    else:
        candidates = np.arange(len(scaled))
    order = candidates[np.argsort(-scaled[candidates], kind="stable")]
    values = scaled[order]
    probabilities = np.exp(values - values[0])
    probabilities /= probabilities.sum()
    if sampling.top_p < 1:
        # The smallest set of the most probable tokens whose probabilities reach top-p.
        count = int(np.searchsorted(np.cumsum(probabilities), sampling.top_p, side="left")) + 1
        order, probabilities = order[:count], probabilities[:count]
        probabilities = probabilities / probabilities.sum()
    if sampling.min_p > 0:
        keep = probabilities >= sampling.min_p * probabilities[0]
        order, probabilities = order[keep], probabilities[keep]
    return order, probabilities / probabilities.sum()
