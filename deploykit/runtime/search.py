"""Which token comes next: the rules of a generation config, greedy choice and beam search.

Everything here gives the tokens that Hugging Face's ``generate`` gives for the same logits (transformers
5, generation/utils.py and logits_process.py), one sentence at a time, so that nothing depends on
the batch that a sentence is in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from deploykit.tasks import Generation

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]

_BLOCKS = 64
_NEVER = -1e9  # Hugging Face's "cannot be chosen", which its comparisons rely on


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


@dataclass(frozen=True)
class Continuations:
    """The best continuations of all hypotheses of one sentence, best first: which one each continues (its
    index), its token, and its log-probability, that of the whole."""

    parents: list[int]
    tokens: list[int]
    scores: list[float]


class Beam:
    """Beam search for one sentence: ``beams`` running hypotheses, and the best finished ones.

    Tokens of the running hypotheses are kept by the caller; ``scores`` are theirs, best first.
    """

    def __init__(self, generation: Generation, eos_token_ids: Sequence[int]) -> None:
        self.beams = generation.beam_size
        self.candidates = max(2, 1 + len(eos_token_ids)) * self.beams
        self._g = generation
        self._eos = frozenset(eos_token_ids)
        # All hypotheses begin alike: only the first may be continued at first.
        self.scores = [0.0] + [_NEVER] * (self.beams - 1)
        self.finished: list[Finished] = []
        self._improvable = True

    def advance(
        self, best: Continuations, length: int, tokens: Callable[[int], Ints]
    ) -> tuple[list[int], list[int]] | None:
        """Choose the next running hypotheses; None when the search is over.

        Args:
            best: ``candidates`` of them.
            length: of the running hypotheses, with the start token; ``tokens(i)`` gives number i.

        Returns: for each new hypothesis, best first, the index of the one it continues, and its token.
        """
        g = self._g
        at_limit = length + 1 >= g.max_length
        ends = [at_limit or token in self._eos for token in best.tokens]
        if any(ends[: self.beams]) and self._improvable and not (self._full and g.early_stopping is True):
            for i in range(self.beams):
                if ends[i]:
                    score = float(np.float32(best.scores[i] / length**g.length_penalty))
                    self.finished.append(Finished(np.append(tokens(best.parents[i])[1:], best.tokens[i]), score))
            self.finished.sort(key=lambda f: -f.score)
            del self.finished[self.beams :]
        going = [i for i, end in enumerate(ends) if not end][: self.beams]
        going += [i for i, end in enumerate(ends) if end][: self.beams - len(going)]
        self.scores = [best.scores[i] + (_NEVER if ends[i] else 0.0) for i in going]
        self._improvable = self._improvable and self._may_improve(length)
        if all(ends) or not self._improvable or (self._full and g.early_stopping is True):
            return None
        return [best.parents[i] for i in going], [best.tokens[i] for i in going]

    @property
    def _full(self) -> bool:
        return len(self.finished) == self.beams

    def _may_improve(self, length: int) -> bool:
        g = self._g
        if not self._full:
            return True
        longest = g.max_length - 1 if g.early_stopping == "never" and g.length_penalty > 0 else length
        return bool(np.float32(self.scores[0] / longest**g.length_penalty) > self.finished[-1].score)


def continuations(beams: Sequence[Beam], values: Floats, columns: Ints) -> list[Continuations]:
    """The best continuations for each of ``beams``, which are of one size.

    ``values`` and ``columns`` are the log-probabilities and tokens of each hypothesis' own best, [beams x size, k].
    """
    n, size, k = len(beams), beams[0].beams, values.shape[1]
    totals = (np.array([beam.scores for beam in beams], np.float32).reshape(-1, 1) + values).reshape(n, size * k)
    best = np.argsort(-totals, axis=1, kind="stable")[:, : beams[0].candidates]
    parents = (best // k).tolist()
    tokens = np.take_along_axis(columns.reshape(n, size * k), best, axis=1).tolist()
    scores = np.take_along_axis(totals, best, axis=1).tolist()
    return [Continuations(*of) for of in zip(parents, tokens, scores)]


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
    if not len(rows):
        return
    scores[rows] = -np.inf
    for token in tokens:
        scores[rows, token] = offset[rows]


def _all_columns(scores: Floats) -> Ints:
    return np.broadcast_to(np.arange(scores.shape[1]), scores.shape)
