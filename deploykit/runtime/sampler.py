"""Sample the next token of an answer with numpy, with the options of a request.

The order of the rules is that of Hugging Face's ``generate``: logit bias, penalties, tokens that cannot come next, and
the rules of ``token_distribution``. transformers' own need torch.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from deploykit.errors import EngineError
from deploykit.runtime.engines.native.sampling import native_draw
from deploykit.runtime.finite import check_highest
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
        self._seen = np.unique(np.asarray(prompt, np.int64)) if sampling.repetition_penalty != 1 else None
        self._counts: dict[int, int] = {}
        self._chosen = 0
        self._bias = dict(sampling.logit_bias)
        self._ends = np.array(sorted({*ends, *sampling.stop_token_ids}), np.int64)
        self._constraint = constraint
        self._random = np.random.default_rng((sampling.seed, answer, *prompt[-64:]))

    def ahead(self) -> Sampler:
        """Return a sampler that chooses the next tokens as this one will, by the same random numbers, and leaves it as it
        is."""
        other = copy.copy(self)
        other._counts = dict(self._counts)
        other._random = copy.deepcopy(self._random)
        other._constraint = None if self._constraint is None else self._constraint.copy()
        return other

    def choose(self, logits: Logits) -> int:
        """Return the next token's id. ``logits``: float32 [vocabulary].

        Raises NoNumberError if a logit is NaN, or the highest infinite.
        """
        check_highest(logits)
        s = self._sampling
        changed = self._without_ends(self._allowed(self._penalized(logits)))
        token = int(changed.argmax()) if s.temperature == 0 else self._drawn(changed)
        self._counts[token] = self._counts.get(token, 0) + 1
        self._chosen += 1
        if self._constraint is not None:
            self._constraint.advance(token)
        return token

    def _penalized(self, logits: Logits) -> Logits:
        s = self._sampling
        penalizes = s.repetition_penalty != 1 or s.presence_penalty != 0 or s.frequency_penalty != 0
        if not penalizes and not self._bias:
            return logits
        logits = logits.copy()
        if self._bias:
            logits[np.fromiter(self._bias, np.int64)] += np.fromiter(self._bias.values(), np.float32)
        answered = np.fromiter(self._counts, np.int64, len(self._counts))
        if self._seen is not None:
            seen = np.union1d(self._seen, answered)
            values = logits[seen]
            logits[seen] = np.where(values < 0, values * s.repetition_penalty, values / s.repetition_penalty)
        if penalizes and len(answered):
            counts = np.fromiter(self._counts.values(), np.float32, len(self._counts))
            logits[answered] -= s.presence_penalty + s.frequency_penalty * counts
        return logits

    def _allowed(self, logits: Logits) -> Logits:
        return logits if self._constraint is None else self._constraint.mask(logits)

    def _without_ends(self, logits: Logits) -> Logits:
        if self._chosen >= self._sampling.min_new_tokens or not len(self._ends):
            return logits
        banned = logits.copy()
        banned[self._ends] = -np.inf
        # A fulfilled constraint may allow only the end token.
        return banned if np.isfinite(banned.max()) else logits

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
