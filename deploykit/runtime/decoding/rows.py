"""The state of the batch's rows, in arrays by row."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from deploykit.runtime.decoding.sentence import Sentence
from deploykit.runtime.engines.protocol import SearchState
from deploykit.runtime.generation import DecodedTask
from deploykit.runtime.search import NEVER, Ints


class Rows:
    """The state of up to ``most`` rows of ``task``.

    - ``tokens``: a row's tokens, from the start token on; ``lengths``: their number; ``limits``: its maximum;
      ``rules_change``: the number at which the rules change.
    - ``scored``, ``before``, ``in_beam``: what to compute in a step, as in ``TokenSelection``.
    - ``sums``: sums of log-probabilities.
    - ``forced``: a token that must come, or -1.
    - ``sentences``: the sentence of each row in use.
    - ``ends``: whether a token of the vocabulary ends a text.
    """

    def __init__(self, task: DecodedTask, most: int, vocabulary: int) -> None:
        self.eos_token_ids = task.eos_token_ids
        self._start = task.decoder_start_token_id
        self.ends = np.zeros(vocabulary, bool)
        self.ends[list(task.eos_token_ids)] = True
        self.tokens = np.zeros((most, task.max_target_length + 1), np.int64)
        self._counts, self._flags = np.zeros((3, most), np.int64), np.zeros((3, most), bool)
        self.lengths, self.limits, self.rules_change = self._counts
        self.scored, self.before, self.in_beam = self._flags
        self.sums = np.zeros(most, np.float32)
        self.forced = np.zeros(most, np.int32)
        self.sentences: list[Sentence] = []
        self.search = SearchState(self.tokens, self.lengths, self.limits, self.sums, self.ends)

    def begin(self, rows: Ints) -> None:
        """Reset ``rows`` to the start token."""
        self.tokens[rows, 0] = self._start
        self.lengths[rows] = 1
        self.sums[rows] = 0.0

    def append(self, sentences: Sequence[Sentence]) -> None:
        """Give each of ``sentences`` new rows, as many as its beam is wide."""
        first = len(self.sentences)
        for sentence in sentences:
            last = len(self.sentences)
            self.sentences += [sentence] * sentence.claims
            sentence.rows = np.arange(last, len(self.sentences))
        theirs = self.sentences[first:]
        rows = np.arange(first, len(self.sentences))
        self.begin(rows)
        self.limits[rows] = [s.generation.max_length for s in theirs]
        self.scored[rows] = [s.scored or s.beam is not None for s in theirs]
        self.before[rows] = [not s.generation.renormalize for s in theirs]
        self.in_beam[rows] = [s.beam is not None for s in theirs]
        for sentence in sentences:
            self.sums[sentence.rows[1:]] = NEVER  # all hypotheses start equal: continue only the first

    def replace(self, row: int, sentence: Sentence) -> None:
        """Give ``row`` to ``sentence``, which has the rules of the one before."""
        sentence.rows = np.array([row])
        self.scored[row], self.sentences[row] = sentence.scored, sentence

    def keep(self, order: Ints) -> None:
        """Keep only the rows of ``order``: row ``i`` becomes what row ``order[i]`` was."""
        moved = np.flatnonzero(order != np.arange(len(order)))
        if len(moved):
            before = order[moved]
            longest = int(self.lengths[before].max())
            self.tokens[moved, :longest] = self.tokens[before, :longest]
            self._counts[:, moved] = self._counts[:, before]
            self._flags[:, moved] = self._flags[:, before]
            self.sums[moved] = self.sums[before]
            for row, was in zip(moved.tolist(), before.tolist()):
                sentence = self.sentences[row] = self.sentences[was]
                sentence.rows[sentence.rows == was] = row
        del self.sentences[len(order) :]
