"""Which token comes next: the rules of a generation config, greedy choice and beam search.

Everything here gives the tokens that Hugging Face's ``generate`` gives for the same logits (transformers
5, generation/utils.py and logits_process.py), one sentence at a time, so that nothing depends on
the batch that a sentence is in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from deploykit.tasks import Generation

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]

_BLOCKS = 64
_NEVER = np.float32(-1e9)  # Hugging Face's "cannot be chosen", which its comparisons rely on


class Rules:
    """What a generation config forbids and forces. ``vocabulary`` bounds the token ids it may name."""

    def __init__(self, generation: Generation, eos_token_ids: Sequence[int]) -> None:
        self._generation = generation
        self._eos = np.array(eos_token_ids, np.int64)
        words = [word for word in generation.bad_words if word not in [(eos,) for eos in eos_token_ids]]
        never = {word[0] for word in words if len(word) == 1} | set(generation.suppressed)
        self._never = np.array(sorted(never), np.int64)
        self._words = [word for word in words if len(word) > 1]

    @property
    def renormalizes(self) -> bool:
        """Whether log-probabilities are of what the rules leave."""
        return self._generation.renormalize

    @property
    def alters(self) -> bool:
        """Whether they change scores of tokens that may still be chosen, and not only forbid some."""
        return self._generation.repetition_penalty != 1.0

    def forces(self, length: int) -> bool:
        """Whether the token after ``length`` others is given."""
        g = self._generation
        return (g.forced_bos_token_id is not None and length == 1) or (
            g.forced_eos_token_id is not None and length == g.max_length - 1
        )

    def apply(self, scores: Floats, rows: Ints, tokens: Ints, lengths: Ints, offset: Floats) -> None:
        """Change ``scores`` [all rows, vocabulary] of ``rows`` in place.

        Args:
            tokens: [all rows, positions], the start token first; ``lengths`` [all rows] of them count.
            offset: [all rows], what must be taken from a score to make it a log-probability (0: leave
                it a logit, as greedy search does).
        """
        g = self._generation
        if g.repetition_penalty != 1.0:
            for row in rows:
                seen = np.unique(tokens[row, : lengths[row]])
                values = scores[row, seen] - offset[row]
                values = np.where(values < 0, values * g.repetition_penalty, values / g.repetition_penalty)
                scores[row, seen] = values + offset[row]
        if g.no_repeat_ngram_size:
            for row in rows:
                scores[row, _repeats(tokens[row, : lengths[row]], g.no_repeat_ngram_size)] = -np.inf
        for word in self._words:
            for row in rows:
                start = lengths[row] + 1 - len(word)
                if start >= 0 and tuple(tokens[row, start : lengths[row]]) == word[:-1]:
                    scores[row, word[-1]] = -np.inf
        if g.min_length:
            early = rows[lengths[rows] < g.min_length]
            scores[early[:, None], self._eos] = -np.inf
        if g.forced_bos_token_id is not None:
            _force(scores, rows[lengths[rows] == 1], [g.forced_bos_token_id], offset)
        if g.forced_eos_token_id is not None:
            _force(scores, rows[lengths[rows] == g.max_length - 1], [g.forced_eos_token_id], offset)
        if len(self._never):
            scores[rows[:, None], self._never] = -np.inf


def log_sum_exp(scores: Floats) -> Floats:
    """float32 [rows]: subtracted from a row of logits it leaves log-probabilities."""
    sums = np.empty(len(scores), np.float32)
    for row, values in enumerate(scores):  # a row at a time fits the cache
        high = values.max()
        sums[row] = high + np.log(np.exp(values - high).sum(dtype=np.float64))
    return sums


def top_k(scores: Floats, k: int) -> tuple[Floats, Ints]:
    """The ``k`` highest of each row, descending, and their columns: [rows, k] each.

    Exact: the highest columns of a row lie in the blocks with the highest maxima.
    """
    rows, width = scores.shape[0], scores.shape[1] // _BLOCKS
    if width < 4 * k:
        columns = np.argpartition(-scores, k - 1, axis=1)[:, :k] if k < scores.shape[1] else _all_columns(scores)
    else:
        # Block b of a row is its columns b, b + width, ...: maxima of whole vectors.
        maxima = scores[:, : width * _BLOCKS].reshape(rows, _BLOCKS, width).max(axis=1)
        blocks = np.argpartition(-maxima, k - 1, axis=1)[:, :k]
        inside = (blocks[:, :, None] + width * np.arange(_BLOCKS)).reshape(rows, -1)
        tail = np.broadcast_to(np.arange(width * _BLOCKS, scores.shape[1]), (rows, scores.shape[1] % _BLOCKS))
        columns = np.concatenate([inside, tail], axis=1)
        best = np.argpartition(-np.take_along_axis(scores, columns, axis=1), k - 1, axis=1)[:, :k]
        columns = np.take_along_axis(columns, best, axis=1)
    values = np.take_along_axis(scores, columns, axis=1)
    order = np.lexsort((columns, -values), axis=1)
    return np.take_along_axis(values, order, axis=1), np.take_along_axis(columns, order, axis=1)


@dataclass
class Finished:
    """A whole hypothesis: its tokens after the start token, and its score with the length penalty."""

    tokens: Ints
    score: float


class Beam:
    """Beam search for one sentence: ``beams`` running hypotheses, and the best finished ones.

    Tokens of the running hypotheses are kept by the caller; ``scores`` are theirs, best first.
    """

    def __init__(self, generation: Generation, eos_token_ids: Sequence[int]) -> None:
        self.beams = generation.beam_size
        self.candidates = max(2, 1 + len(eos_token_ids)) * self.beams
        self._g = generation
        self._eos = frozenset(eos_token_ids)
        self.scores = np.full(self.beams, _NEVER, np.float32)
        self.scores[0] = 0.0  # all hypotheses begin alike: only the first may be continued at first
        self.finished: list[Finished] = []
        self._improvable = True

    def advance(self, values: Floats, columns: Ints, tokens: Ints) -> tuple[list[int], list[int]] | None:
        """Choose the next running hypotheses; None when the search is over.

        Args:
            values, columns: [beams, candidates] log-probabilities and tokens of the best continuations of each.
            tokens: [beams, length], the start token first.

        Returns: for each new hypothesis, best first, the index of the one it continues, and its token.
        """
        g, length = self._g, tokens.shape[1]
        totals = (self.scores[:, None] + values).ravel()
        best = np.argsort(-totals, kind="stable")[: self.candidates]
        parents, chosen = (best // values.shape[1]).tolist(), columns.ravel()[best].tolist()
        log_probabilities = totals[best]
        at_limit = length + 1 >= g.max_length
        ends = [at_limit or token in self._eos for token in chosen]
        if self._improvable and not (len(self.finished) == self.beams and g.early_stopping is True):
            for i in range(self.beams):
                if ends[i]:
                    score = float(np.float32(log_probabilities[i] / np.float32(length**g.length_penalty)))
                    self.finished.append(Finished(np.append(tokens[parents[i], 1:], chosen[i]), score))
            self.finished.sort(key=lambda f: -f.score)
            del self.finished[self.beams :]
        going = sorted(range(len(best)), key=lambda i: (ends[i], i))[: self.beams]
        self.scores = np.array([log_probabilities[i] + (_NEVER if ends[i] else 0) for i in going], np.float32)
        self._improvable = self._improvable and self._may_improve(length)
        full = len(self.finished) == self.beams
        if all(ends) or not self._improvable or (full and g.early_stopping is True):
            return None
        return [parents[i] for i in going], [chosen[i] for i in going]

    def _may_improve(self, length: int) -> bool:
        g = self._g
        if len(self.finished) < self.beams:
            return True
        longest = g.max_length - 1 if g.early_stopping == "never" and g.length_penalty > 0 else length
        return bool(self.scores[0] / np.float32(longest**g.length_penalty) > self.finished[-1].score)


def _repeats(tokens: Ints, size: int) -> list[int]:
    """Tokens that would complete an n-gram of ``size`` which ``tokens`` already hold."""
    if len(tokens) + 1 < size:
        return []
    if size == 1:
        return [int(t) for t in np.unique(tokens)]
    windows = np.lib.stride_tricks.sliding_window_view(tokens, size) if len(tokens) >= size else np.empty((0, size))
    same = (windows[:, :-1] == tokens[len(tokens) - size + 1 :]).all(axis=1)
    return [int(t) for t in np.unique(windows[same, -1])]


def _force(scores: Floats, rows: Ints, tokens: Sequence[int], offset: Floats) -> None:
    scores[rows] = -np.inf
    for token in tokens:
        scores[rows, token] = offset[rows]


def _all_columns(scores: Floats) -> Ints:
    return np.broadcast_to(np.arange(scores.shape[1]), scores.shape)
