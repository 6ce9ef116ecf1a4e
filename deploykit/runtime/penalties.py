"""Change the logits of an answer's next token by logit bias and penalties, in place, and change them back.

Only the tokens of bias, prompt and answer are touched, so a token costs the same with any vocabulary. Hugging Face's
``generate`` has the same rules, in the same order.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from deploykit.runtime.engines.native.sampling import PenalizedTokens, native_penalties
from deploykit.runtime.sampling import Sampling

Logits = NDArray[np.float32]

_Kind = TypeVar("_Kind", bound=np.generic)
_ROOM = 64
"""Tokens that a list has room for when its first one is added."""


class Penalties:
    """The bias and penalties of one answer. It follows the answer's tokens."""

    def __init__(self, sampling: Sampling, prompt: Sequence[int]) -> None:
        self._sampling = sampling
        self._biased = np.array([token for token, _ in sampling.logit_bias], np.int32)
        self._bias = np.array([value for _, value in sampling.logit_bias], np.float32)
        self._subtracts = sampling.presence_penalty != 0 or sampling.frequency_penalty != 0
        self._repeated = set(prompt) if sampling.repetition_penalty != 1 else set()
        self._places: dict[int, int] = {}
        self._seen, self._seen_count = np.array(sorted(self._repeated), np.int32), len(self._repeated)
        self._answered, self._counts = np.empty(0, np.int32), np.empty(0, np.float32)
        self._before = np.empty(0, np.float32)
        self._highest = max([*self._repeated, *self._biased.tolist()], default=-1)
        self._tokens = PenalizedTokens(
            biased_count=len(self._biased), seen_count=self._seen_count, repetition=sampling.repetition_penalty,
            presence=sampling.presence_penalty, frequency=sampling.frequency_penalty,
        )  # fmt: skip
        self._make_room()

    @staticmethod
    def are_wanted(sampling: Sampling) -> bool:
        """Return whether the options change any logits."""
        return bool(
            sampling.logit_bias
            or sampling.repetition_penalty != 1
            or sampling.presence_penalty
            or sampling.frequency_penalty
        )

    def copy(self) -> Penalties:
        """Return the same penalties for another answer with the same tokens so far."""
        other = copy.copy(self)
        other._repeated, other._places = set(self._repeated), dict(self._places)
        other._seen, other._answered, other._counts = self._seen.copy(), self._answered.copy(), self._counts.copy()
        other._tokens = PenalizedTokens.from_buffer_copy(self._tokens)
        other._make_room()
        return other

    def add(self, token: int) -> None:
        """Note a token of the answer."""
        self._highest = max(self._highest, token)
        if self._sampling.repetition_penalty != 1 and token not in self._repeated:
            if self._seen_count == len(self._seen):
                self._seen = _longer(self._seen)
                self._make_room()
            self._seen[self._seen_count] = token
            self._repeated.add(token)
            self._seen_count += 1
            self._tokens.seen_count = self._seen_count
        if self._subtracts:
            place = self._places.setdefault(token, len(self._places))
            if place == len(self._answered):
                self._answered, self._counts = _longer(self._answered), _longer(self._counts)
                self._make_room()
            self._answered[place] = token
            self._counts[place] += 1
            self._tokens.answered_count = len(self._places)

    def apply(self, logits: Logits) -> None:
        """Change ``logits``, float32 [vocabulary], contiguous. Raises IndexError for a token that they do not have."""
        if self._highest >= len(logits):
            raise IndexError(f"token {self._highest} is not among {len(logits):,} logits")
        native = native_penalties()
        if native is not None:
            native.apply(logits, self._tokens)
            return
        s, before = self._sampling, []
        before.append(logits[self._biased])
        logits[self._biased] += self._bias
        seen = self._seen[: self._seen_count]
        values = logits[seen]
        before.append(values)
        logits[seen] = np.where(values < 0, values * s.repetition_penalty, values / s.repetition_penalty)
        answered, counts = self._answered[: len(self._places)], self._counts[: len(self._places)]
        before.append(logits[answered])
        logits[answered] -= s.presence_penalty + s.frequency_penalty * counts
        np.concatenate(before, out=self._before[: sum(map(len, before))])

    def undo(self, logits: Logits) -> None:
        """Give ``logits`` the values from before ``apply``."""
        native = native_penalties()
        if native is not None:
            native.undo(logits, self._tokens)
            return
        lists = (self._biased, self._seen[: self._seen_count], self._answered[: len(self._places)])
        end = sum(map(len, lists))
        for tokens in reversed(lists):
            logits[tokens] = self._before[end - len(tokens) : end]
            end -= len(tokens)

    def _make_room(self) -> None:
        """Tell the library where the lists are, and keep room for the logits of all their tokens."""
        self._before = np.empty(len(self._biased) + len(self._seen) + len(self._answered), np.float32)
        for name in ("biased", "bias", "seen", "answered", "counts", "before"):
            setattr(self._tokens, name, getattr(self, f"_{name}").ctypes.data)


def _longer(values: NDArray[_Kind]) -> NDArray[_Kind]:
    """Return the values with as much room again, filled with 0."""
    return np.concatenate([values, np.zeros(max(len(values), _ROOM), values.dtype)])
