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

from deploykit.runtime.generation import Generation

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]

NEVER = -1e9
"""Hugging Face's "cannot be chosen", which its comparisons rely on."""


class Rules:
    """What a generation config forbids and forces. ``vocabulary`` bounds the token ids it may name."""

    def __init__(self, generation: Generation, eos_token_ids: Sequence[int]) -> None:
        self._generation = generation
        words = [word for word in generation.bad_words if word not in [(eos,) for eos in eos_token_ids]]
        self.never = sorted({word[0] for word in words if len(word) == 1} | set(generation.suppressed))
        """What may never come."""
        self._words = [word for word in words if len(word) > 1]
        self._early = sorted({*self.never, *eos_token_ids})
        self.penalty = generation.repetition_penalty
        """What the scores of tokens that have come are divided by (multiplied, below 0)."""
        self.vary = bool(generation.no_repeat_ngram_size or self._words) or self.penalty != 1.0
        """Whether what they say depends on which tokens have come."""
        turns = {generation.min_length, generation.max_length + 1}
        if generation.forced_bos_token_id is not None:
            turns.add(2)
        if generation.forced_eos_token_id is not None:
            turns.add(generation.max_length - 1)
        self._turns = np.array(sorted(turns))

    def turn(self, lengths: Ints) -> Ints:
        """For rows of so many tokens the length from which on the rules say something else, if they do not ``vary``."""
        return self._turns[np.searchsorted(self._turns, lengths, side="right")]

    def forced(self, lengths: Ints) -> NDArray[np.int32]:
        """For rows of so many tokens the one that must come next, or -1."""
        g = self._generation
        given = np.full(len(lengths), -1, np.int32)
        if g.forced_bos_token_id is not None:
            given[lengths == 1] = g.forced_bos_token_id
        if g.forced_eos_token_id is not None:
            given[lengths == g.max_length - 1] = g.forced_eos_token_id
        return given

    def always(self, length: int) -> list[int]:
        """What must not follow any ``length`` tokens: ascending. It is all that rules forbid which do not ``vary``."""
        return self._early if length < self._generation.min_length else self.never

    def forbidden(self, tokens: Ints) -> list[int]:
        """What must not follow ``tokens``, the start token first: ascending."""
        g = self._generation
        ids = set(self.always(len(tokens)))
        if g.no_repeat_ngram_size:
            ids.update(_repeats(tokens, g.no_repeat_ngram_size))
        for word in self._words:
            start = len(tokens) + 1 - len(word)
            if start >= 0 and tuple(tokens[start:].tolist()) == word[:-1]:
                ids.add(word[-1])
        return sorted(ids)


@dataclass(frozen=True)
class Continuations:
    """Hypotheses of a sentence, best first: which one each continues (its index), its token, and its log-probability,
    that of the whole."""

    parents: list[int]
    tokens: list[int]
    scores: list[float]


@dataclass
class Finished:
    """A whole hypothesis: its tokens after the start token, and its score with the length penalty."""

    tokens: Ints
    score: float


class Beam:
    """Beam search for one sentence: how many hypotheses run, and the best finished ones.

    The running ones, their tokens and their scores, best first, are kept by the caller.
    """

    def __init__(self, generation: Generation, eos_token_ids: Sequence[int]) -> None:
        self.generation = generation
        self.eos_token_ids = eos_token_ids
        self.beams = generation.beam_size
        self.finished: list[Finished] = []
        self.improvable = True
        """Whether a hypothesis that still runs may become better than those finished."""

    def advance(self, best: Continuations, length: int, tokens: Ints) -> Continuations | None:
        """Choose the next running hypotheses, best first; None when the search is over.

        Args:
            best: of all hypotheses together, best first, ``candidates`` of them.
            length: of the running hypotheses, whose ``tokens`` are [beams, length], the start token first.

        While none of ``best`` ends and nothing is finished, the answer is the first of ``best``.
        """
        g = self.generation
        at_limit = length + 1 >= g.max_length
        ends = [at_limit or token in self.eos_token_ids for token in best.tokens]
        if any(ends[: self.beams]) and self.improvable and not (self._full and g.early_stopping is True):
            for i in range(self.beams):
                if ends[i]:
                    score = float(np.float32(best.scores[i] / length**g.length_penalty))
                    self.finished.append(Finished(np.append(tokens[best.parents[i], 1:], best.tokens[i]), score))
            self.finished.sort(key=lambda f: -f.score)
            del self.finished[self.beams :]
        going = [i for i, end in enumerate(ends) if not end][: self.beams]
        going += [i for i, end in enumerate(ends) if end][: self.beams - len(going)]
        scores = [best.scores[i] + (NEVER if ends[i] else 0.0) for i in going]
        self.improvable = self.improvable and self._may_improve(scores[0], length)
        if all(ends) or not self.improvable or (self._full and g.early_stopping is True):
            return None
        return Continuations([best.parents[i] for i in going], [best.tokens[i] for i in going], scores)

    @property
    def _full(self) -> bool:
        return len(self.finished) == self.beams

    def _may_improve(self, best_score: float, length: int) -> bool:
        g = self.generation
        if not self._full:
            return True
        longest = g.max_length - 1 if g.early_stopping == "never" and g.length_penalty > 0 else length
        return bool(np.float32(best_score / longest**g.length_penalty) > self.finished[-1].score)


def candidates(beams: int, eos_token_ids: Sequence[int]) -> int:
    """How many continuations of a sentence to look at: ``beams`` of them go on, even if some end."""
    return max(2, 1 + len(eos_token_ids)) * beams


def _repeats(tokens: Ints, size: int) -> list[int]:
    """Tokens that would complete an n-gram of ``size`` which ``tokens`` already hold."""
    if len(tokens) + 1 < size:
        return []
    if size == 1:
        return [int(t) for t in np.unique(tokens)]
    windows = np.lib.stride_tricks.sliding_window_view(tokens, size) if len(tokens) >= size else np.empty((0, size))
    same = (windows[:, :-1] == tokens[len(tokens) - size + 1 :]).all(axis=1)
    return [int(t) for t in np.unique(windows[same, -1])]
