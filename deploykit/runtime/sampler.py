"""Sample the next token of an answer, with the options of a request.

The rules are those of Hugging Face's ``generate``: logit bias, penalties, tokens that cannot come next, and the rules of
``token_distribution``. A grammar's mask is applied first here, with the same result: bias and penalties leave -inf as it is.
transformers' own rules need torch.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from deploykit.errors import EngineError
from deploykit.runtime.engines.native.sampling import native_draw
from deploykit.runtime.finite import NoNumberError, check_highest
from deploykit.runtime.penalties import Penalties
from deploykit.runtime.sampling import Sampling
from deploykit.runtime.token_distribution import distribution, draw

Logits = NDArray[np.float32]


class Constraint(Protocol):
    """A rule for the next token, such as a grammar."""

    def mask(self, logits: Logits) -> Logits:
        """Return a copy of float32 [vocabulary] with -inf at the tokens that are not allowed next."""

    def advance(self, token_id: int) -> None:
        """Update the rule with the chosen token."""

    def copy(self) -> Constraint:
        """Return a rule that goes on from here by itself."""


class Sampler:
    """A sampler of one answer. Its random numbers depend only on seed, prompt and answer number, not on other rows.

    ``ends``: tokens that end an answer, which cannot occur among the first ``min_new_tokens``.
    """

    def __init__(
        self,
        sampling: Sampling,
        prompt: Sequence[int],
        answer: int = 0,
        *,
        ends: Sequence[int] = (),
        constraint: Constraint | None = None,
    ) -> None:
        self._sampling = sampling
        self._penalties = Penalties(sampling, prompt) if Penalties.are_wanted(sampling) else None
        self._chosen = 0
        self._ends = np.array(sorted({*ends, *sampling.stop_token_ids}), np.int64)
        self._constraint = constraint
        self._random = np.random.default_rng((sampling.seed, answer, *prompt[-64:]))

    def ahead(self) -> Sampler:
        """Return a sampler that chooses the next tokens as this one will, by the same random numbers, and leaves it as it
        is."""
        other = copy.copy(self)
        other._penalties = None if self._penalties is None else self._penalties.copy()
        other._random = copy.deepcopy(self._random)
        other._constraint = None if self._constraint is None else self._constraint.copy()
        return other

    def choose(self, logits: Logits) -> int:
        """Return the next token's id. ``logits``: float32 [vocabulary].

        Raises NoNumberError if a logit is NaN, or the highest infinite.
        """
        ends = self._ends if self._chosen < self._sampling.min_new_tokens else self._ends[:0]
        if self._sampling.temperature == 0 and self._constraint is None and not len(ends):
            token = self._with_penalties(logits, _best)
            if not math.isfinite(logits[token]):
                raise NoNumberError
        else:
            check_highest(logits)
            allowed = logits if self._constraint is None else self._constraint.mask(logits)
            token = self._with_penalties(allowed, partial(self._choose_except, ends))
        self._chosen += 1
        if self._penalties is not None:
            self._penalties.add(token)
        if self._constraint is not None:
            self._constraint.advance(token)
        return token

    def _with_penalties(self, logits: Logits, choose: Callable[[Logits], int]) -> int:
        """Return what ``choose`` returns for the logits with bias and penalties."""
        if self._penalties is None:
            return choose(logits)
        logits = _writable(logits)
        self._penalties.apply(logits)
        try:
            return choose(logits)
        finally:
            self._penalties.undo(logits)

    def _choose_except(self, ends: NDArray[np.int64], logits: Logits) -> int:
        """Choose a token that is not one of ``ends``, or one of them if no other is allowed."""
        if len(ends):
            logits = _writable(logits)
            before = logits[ends]
            logits[ends] = -np.inf
            try:
                if np.isfinite(logits.max()):
                    return self._best_or_drawn(logits)
            finally:
                logits[ends] = before
        return self._best_or_drawn(logits)  # a fulfilled constraint may allow only the end token

    def _best_or_drawn(self, logits: Logits) -> int:
        return _best(logits) if self._sampling.temperature == 0 else self._drawn(logits)

    def _drawn(self, logits: Logits) -> int:
        s, uniform = self._sampling, self._random.random()
        fast = native_draw()
        if fast is not None:
            token = fast(logits, s.temperature, s.top_k, s.top_p, s.min_p, s.typical_p, uniform)
        elif np.isfinite(logits.max()):
            kept, shares = distribution(
                logits, temperature=s.temperature, top_k=s.top_k, top_p=s.top_p, min_p=s.min_p, typical_p=s.typical_p
            )
            token = int(kept[draw(shares, uniform)])
        else:
            token = -1
        if token < 0:
            raise EngineError("the model's logits are not finite", "export the model again, in another precision")
        return token


def _writable(logits: Logits) -> Logits:
    """Return the logits, or a copy that the library can change."""
    return logits if logits.flags.carray else logits.copy()


def _best(logits: Logits) -> int:
    return int(logits.argmax())
