"""Beam search for one prompt: the hypotheses of its rows. Given the same logits, tokens are those of ``generate``."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from deploykit.runtime.finite import NoNumberError
from deploykit.runtime.generation import Generation
from deploykit.runtime.sampling import Sampling
from deploykit.runtime.search import NEVER, Beam, Continuations, Finished, candidates
from deploykit.runtime.token_distribution import top_tokens


@dataclass(frozen=True)
class Moves:
    """The next hypotheses, best first: the row that each continues, and its next token."""

    parents: list[int]
    tokens: list[int]


class BeamSearch:
    """``ends``: tokens that end a hypothesis. ``most``: most tokens of an answer."""

    def __init__(self, sampling: Sampling, ends: Collection[int], most: int) -> None:
        self._ends = sorted(ends)
        # The prompt counts as one token, as a translator's start token does.
        generation = Generation(
            beam_size=sampling.num_beams,
            max_length=1 + most,
            length_penalty=sampling.length_penalty,
            early_stopping=sampling.early_stopping,
        )
        self._beam = Beam(generation, self._ends)
        self._least = sampling.min_new_tokens
        self._tokens = np.zeros((sampling.num_beams, 1), np.int64)
        self._scores = np.full(sampling.num_beams, NEVER, np.float32)
        self._scores[0] = 0.0  # all hypotheses start equal: continue only the first

    @property
    def finished(self) -> list[Finished]:
        """The finished hypotheses, best first."""
        return self._beam.finished

    def advance(self, logits: NDArray[np.float32]) -> Moves | None:
        """Take the logits of each row's next token, float32 [beams, vocabulary]. Returns None when the search is over.

        Raises NoNumberError if a logit is NaN, or the highest of a row infinite.
        """
        most = logits.max(1, keepdims=True)
        if not np.isfinite(most).all():
            raise NoNumberError
        shifted = logits - most
        logs = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
        length = self._tokens.shape[1]
        if length <= self._least:
            logs[:, self._ends] = -np.inf
        totals = (self._scores[:, None] + logs).ravel()
        best = top_tokens(totals, candidates(len(logits), self._ends))
        parents, tokens = np.divmod(best, logits.shape[1])
        found = Continuations(parents.tolist(), tokens.tolist(), totals[best].tolist())
        following = self._beam.advance(found, length, self._tokens)
        if following is None:
            return None
        self._tokens = np.column_stack([self._tokens[following.parents], following.tokens])
        self._scores = np.array(following.scores, np.float32)
        return Moves(following.parents, following.tokens)


def rearranged(parents: list[int]) -> tuple[list[int], list[int], list[int]]:
    """Assign a row to each new hypothesis. Returns these rows, and the rows to copy from and to.

    A parent's first child keeps the parent's row; further children get the rows of hypotheses that were dropped.
    """
    free = sorted(set(range(len(parents))) - set(parents))
    rows, sources, targets = [], [], []
    kept: set[int] = set()
    for parent in parents:
        if parent in kept:
            rows.append(free.pop(0))
            sources.append(parent)
            targets.append(rows[-1])
        else:
            kept.add(parent)
            rows.append(parent)
    return rows, sources, targets
