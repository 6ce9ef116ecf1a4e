"""Choose the next token with the rules of a generation config, and with beam search.

Given the same logits, the tokens are those of Hugging Face's ``generate`` (transformers 5, generation/utils.py and
logits_process.py). Sentences are searched one by one, so nothing depends on the rest of the batch.
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
"""Score of a token that cannot be chosen; the same number as in Hugging Face, whose comparisons rely on it."""


class Rules:
    """The tokens that a generation config forbids and forces. ``eos_token_ids`` end a text."""

    def __init__(self, generation: Generation, eos_token_ids: Sequence[int]) -> None:
        self._generation = generation
        words = [word for word in generation.bad_words if word not in [(eos,) for eos in eos_token_ids]]
        self.never = sorted({word[0] for word in words if len(word) == 1} | set(generation.suppressed))
        """Tokens that are never allowed."""
        self._words = [word for word in words if len(word) > 1]
        self._early = sorted({*self.never, *eos_token_ids})
        self.penalty = generation.repetition_penalty
        """Repetition penalty: divides the scores of tokens that occurred (multiplies scores below 0)."""
        self.vary = bool(generation.no_repeat_ngram_size or self._words) or self.penalty != 1.0
        """Whether the forbidden tokens depend on the tokens generated so far."""
        turns = {generation.min_length, generation.max_length + 1}
        if generation.forced_bos_token_id is not None:
            turns.add(2)
        if generation.forced_eos_token_id is not None:
            turns.add(generation.max_length - 1)
        self._changes = np.array(sorted(turns))

    def next_change(self, lengths: Ints) -> Ints:
        """Return, for rows of these lengths, the next length at which the rules change; valid unless they ``vary``."""
        return self._changes[np.searchsorted(self._changes, lengths, side="right")]

    def forced(self, lengths: Ints) -> NDArray[np.int32]:
        """Return, for rows of these lengths, the token that must come next, or -1."""
        g = self._generation
        given = np.full(len(lengths), -1, np.int32)
        if g.forced_bos_token_id is not None:
            given[lengths == 1] = g.forced_bos_token_id
        if g.forced_eos_token_id is not None:
            given[lengths == g.max_length - 1] = g.forced_eos_token_id
        return given

    def always(self, length: int) -> list[int]:
        """Return the tokens that must not follow any ``length`` tokens, ascending.

        For rules that do not ``vary``, these are all the forbidden tokens.
        """
        return self._early if length < self._generation.min_length else self.never

    def forbidden(self, tokens: Ints) -> list[int]:
        """Return the tokens that must not follow ``tokens``, ascending. ``tokens`` begin with the start token."""
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
    """Hypotheses of a sentence, best first: the index of the parent, the new token, and the log-probability of the
    whole.
    """

    parents: list[int]
    tokens: list[int]
    scores: list[float]


@dataclass
class Finished:
    """A finished hypothesis: its tokens without the start token, and its score with the length penalty, NaN if the model
    computed no number."""

    tokens: Ints
    score: float


class Beam:
    """Beam search for one sentence: its number of beams, and its best finished hypotheses.

    The caller keeps the running hypotheses, best first, with their tokens and scores.
    """

    def __init__(self, generation: Generation, eos_token_ids: Sequence[int]) -> None:
        self.generation = generation
        self.eos_token_ids = eos_token_ids
        self.beams = generation.beam_size
        self.finished: list[Finished] = []
        self.improvable = True
        """Whether a running hypothesis may still become better than the finished ones."""

    def advance(self, best: Continuations, length: int, tokens: Ints) -> Continuations | None:
        """Choose the next running hypotheses, best first; None when the search is over.

        Args:
            best: the ``candidates`` best continuations of all hypotheses together, best first.
            length: number of tokens of the running hypotheses, the start token included.
            tokens: the running hypotheses, [beams, length].

        While no continuation ends and nothing is finished, this returns the first of ``best``.
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
        """Return whether a running hypothesis can still beat the worst of the finished ones."""
        g = self.generation
        if not self._full:
            return True
        longest = g.max_length - 1 if g.early_stopping == "never" and g.length_penalty > 0 else length
        return bool(np.float32(best_score / longest**g.length_penalty) > self.finished[-1].score)


def candidates(beams: int, eos_token_ids: Sequence[int]) -> int:
    """Return how many continuations of a sentence to consider, so that ``beams`` of them remain even if some end."""
    return max(2, 1 + len(eos_token_ids)) * beams


def _repeats(tokens: Ints, size: int) -> list[int]:
    """Return the tokens that would complete an n-gram of ``size`` that ``tokens`` already contain."""
    if len(tokens) + 1 < size:
        return []
    if size == 1:
        return [int(t) for t in np.unique(tokens)]
    windows = np.lib.stride_tricks.sliding_window_view(tokens, size) if len(tokens) >= size else np.empty((0, size))
    same = (windows[:, :-1] == tokens[len(tokens) - size + 1 :]).all(axis=1)
    return [int(t) for t in np.unique(windows[same, -1])]
