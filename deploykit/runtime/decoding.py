"""The decode loop: sentences join and leave the running batch between any two steps.

A step feeds every running row its last token. What waits joins as soon as there is room, and a sentence
that is done leaves at once, so no row is computed for nothing. A sentence's tokens and score do not
depend on what runs beside it.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields

import numpy as np
from numpy.typing import NDArray

from deploykit.runtime.engines.seq2seq import Seq2SeqModel
from deploykit.runtime.generation import MAX_ROWS
from deploykit.runtime.search import Beam, Finished, Floats, Ints, Rules, continuations, top_k
from deploykit.tasks import Generation, Translation

MAX_CACHE_BYTES = 512 << 20
_TOKENS_PER_ENCODE = 2048
_JOIN_SHARE = 8  # a full batch takes new sentences when an eighth of its rows is free: single ones encode slowly


@dataclass
class Sentence:
    """One source sentence on its way. ``token_ids`` have their special tokens; ``result`` is set when it is done.

    ``scored``: whether the score is wanted, which costs a pass over the vocabulary. ``cancelled`` may
    be set at any time: the sentence then leaves without a result.
    """

    token_ids: Sequence[int]
    generation: Generation
    scored: bool = True
    cancelled: bool = False
    result: Finished | None = None
    rows: Ints = field(default_factory=lambda: np.empty(0, np.int64))
    beam: Beam | None = None


@dataclass
class Seconds:
    """Where a translator's time went. Its decoder counts ``encoder``, ``decoder`` and ``search``."""

    tokenizing: float = 0.0
    encoder: float = 0.0
    decoder: float = 0.0
    search: float = 0.0
    detokenizing: float = 0.0

    def add(self, other: Seconds, share: float) -> None:
        for field_ in fields(self):
            setattr(self, field_.name, getattr(self, field_.name) + share * getattr(other, field_.name))


class Decoder:
    """The sentences ``waiting`` and ``running``, and the model that they run on. One caller at a time.

    ``max_rows`` and ``max_cache_bytes`` bound a step: what does not fit waits, and a sentence that has
    outgrown the room is begun again later. ``run`` may use up to ``workers`` decoders side by side, of
    as many rows each: where sentences are many that is faster than threads within a step.
    """

    def __init__(
        self,
        model: Seq2SeqModel,
        task: Translation,
        *,
        max_rows: int = MAX_ROWS,
        max_cache_bytes: int = MAX_CACHE_BYTES,
        workers: int = 1,
    ) -> None:
        self.waiting: deque[Sentence] = deque()
        self.running: list[Sentence] = []
        self.seconds = Seconds()
        self.max_rows = max_rows
        self._model = model
        self._task = task
        self._max_cache_bytes = max_cache_bytes
        self._workers = workers
        self._side_by_side: dict[int, list[Decoder]] = {}  # by how many
        self._rules: dict[Generation, Rules] = {}
        # By row: the start token and what was generated since; how many that is; their log-probability.
        self._tokens = np.zeros((max_rows, task.max_target_length + 1), np.int64)
        self._lengths = np.zeros(max_rows, np.int64)
        self._sums = np.zeros(max_rows, np.float32)
        self._groups: list[tuple[Rules, Ints]] | None = None

    @property
    def claimed(self) -> int:
        """Rows that the sentences running and waiting take."""
        return sum(s.generation.beam_size for s in (*self.running, *self.waiting))

    def add(self, sentence: Sentence) -> None:
        self.waiting.append(sentence)

    def run(self, sentences: Sequence[Sentence]) -> None:
        """Decode ``sentences`` to their ends."""
        workers = min(self._workers, sum(s.generation.beam_size for s in sentences) // self._model.rows_of_a_worker)
        if workers > 1:
            self._run_side_by_side(sentences, workers)
            return
        self.waiting.extend(sentences)
        while self.waiting or self.running:
            self.step()

    def _run_side_by_side(self, sentences: Sequence[Sentence], n: int) -> None:
        if n not in self._side_by_side:
            self._side_by_side[n] = [
                Decoder(model, self._task, max_rows=self.max_rows, max_cache_bytes=self._max_cache_bytes // n)
                for model in self._model.side_by_side(n)
            ]
        decoders = self._side_by_side[n]
        left = deque(sentences)
        share = -(-sum(s.generation.beam_size for s in sentences) // n)
        taking = threading.Lock()

        def take(decoder: Decoder) -> bool:
            if not left:
                return False
            claimed = decoder.claimed
            if claimed and claimed + left[0].generation.beam_size > min(share, self.max_rows):
                return False
            decoder.add(left.popleft())
            return True

        def work(decoder: Decoder) -> None:
            try:
                while decoder.waiting or decoder.running:
                    decoder.step()
                    with taking:
                        while take(decoder):
                            pass
            finally:
                left.clear()  # nothing is left, or this one has failed and the others need not go on

        while sum(take(decoder) for decoder in decoders):  # one each in turn: the longest ones come first
            pass
        with ThreadPoolExecutor(n) as pool:
            try:
                for future in [pool.submit(work, decoder) for decoder in decoders]:
                    future.result()
            except BaseException:
                del self._side_by_side[n]  # they still hold sentences
                raise
        for decoder in decoders:
            self.seconds.add(decoder.seconds, 1 / n)
            decoder.seconds = Seconds()

    def step(self) -> list[Sentence]:
        """Let sentences join, feed every row one token, and return the sentences that are done with it."""
        started = time.perf_counter()
        self._leave([s for s in self.running if s.cancelled])
        self._join()
        if not self.running:
            return []
        self._make_room()
        encoded = time.perf_counter()
        rows = self._model.rows
        logits = self._model.step(self._tokens[np.arange(rows), self._lengths[:rows] - 1])
        stepped = time.perf_counter()
        done = self._choose(logits)
        self._leave(done)
        self.seconds.encoder += encoded - started
        self.seconds.decoder += stepped - encoded
        self.seconds.search += time.perf_counter() - stepped
        return done

    def _join(self) -> None:
        free = self.max_rows - self._model.rows
        if not self.waiting or (self.running and free < self.max_rows // _JOIN_SHARE):
            return
        joining: list[Sentence] = []
        longest = max((len(s.token_ids) for s in self.running), default=0)
        while self.waiting:
            sentence = self.waiting[0]
            if sentence.cancelled:
                self.waiting.popleft()
                continue
            longest = max(longest, len(sentence.token_ids))
            rows = self._model.rows + sum(s.generation.beam_size for s in joining) + sentence.generation.beam_size
            crowded = rows > self.max_rows or self._model.cache_bytes(rows, longest, longest) > self._max_cache_bytes
            if crowded and (self.running or joining):
                break
            joining.append(self.waiting.popleft())
        if joining:
            rows = self._model.rows + sum(s.generation.beam_size for s in joining)
            self._model.reserve(rows, max(len(s.token_ids) for s in joining))
        for group in _of_similar_length(joining):
            cross = self._model.encode([s.token_ids for s in group])
            for text, sentence in enumerate(group):
                self._admit(sentence, cross, text)

    def _admit(self, sentence: Sentence, cross: Floats, text: int) -> None:
        beams = sentence.generation.beam_size
        sentence.rows = self._model.admit(cross, text, len(sentence.token_ids), beams)
        sentence.beam = Beam(sentence.generation, self._task.eos_token_ids) if beams > 1 else None
        self._tokens[sentence.rows, 0] = self._task.decoder_start_token_id
        self._lengths[sentence.rows] = 1
        self._sums[sentence.rows] = 0.0
        self.running.append(sentence)
        self._groups = None

    def _make_room(self) -> None:
        """Send the youngest sentences back while the caches that this step needs are too large."""
        while len(self.running) > 1:
            rows = self._model.rows
            longest = int(self._lengths[:rows].max())
            source = max(len(s.token_ids) for s in self.running)
            if self._model.cache_bytes(rows, longest, source) <= self._max_cache_bytes:
                return
            youngest = self.running[-1]
            self._leave([youngest])
            self.waiting.appendleft(youngest)

    def _choose(self, logits: Floats) -> list[Sentence]:
        """Append the next token of every row; returns the sentences that end with it."""
        rows = self._model.rows
        sums, offset = np.zeros(rows, np.float32), np.zeros(rows, np.float32)
        if not any(s.scored or s.beam is not None for s in self.running):
            self._apply_rules(logits, offset)
            return self._choose_greedily(logits, logits, sums)
        beams = np.array([row for s in self.running if s.beam is not None for row in s.rows], np.int64)
        scored = np.array([row for s in self.running if s.beam is None and s.scored for row in s.rows], np.int64)
        wanted = np.zeros(rows, bool)
        wanted[beams] = wanted[scored] = True
        # When they are summed: before the rules, or of what these leave.
        before, after = wanted.copy(), np.zeros(rows, bool)
        for rules, theirs in self._rule_groups():
            after[theirs] = wanted[theirs] & rules.renormalizes
            before[theirs] &= rules.alters or not rules.renormalizes
        self._sum_up(logits, before, sums)
        raw = logits.copy() if len(scored) and self._altering() else logits
        offset[beams] = sums[beams]
        self._apply_rules(logits, offset)
        self._sum_up(logits, after, sums)
        done: list[Sentence] = []
        if len(beams) < rows:
            done += self._choose_greedily(logits, raw, sums)
        if len(beams):
            done += self._advance_beams(logits, beams, sums)
        return done

    def _apply_rules(self, logits: Floats, offset: Floats) -> None:
        for rules, theirs in self._rule_groups():
            rules.apply(logits, theirs, self._tokens, self._lengths, offset)

    def _choose_greedily(self, logits: Floats, raw: Floats, sums: Floats) -> list[Sentence]:
        done = []
        chosen = logits.argmax(axis=1)
        for sentence in self.running:
            if sentence.beam is not None:
                continue
            row, g = int(sentence.rows[0]), sentence.generation
            token, length = int(chosen[row]), int(self._lengths[row])
            self._tokens[row, length] = token
            self._lengths[row] = length + 1
            if sentence.scored and not self._rules[g].forces(length):
                self._sums[row] += raw[row, token] - sums[row]
            if token in self._task.eos_token_ids or length + 1 >= g.max_length:
                score = float(self._sums[row]) / length**g.length_penalty
                sentence.result = Finished(self._tokens[row, 1 : length + 1].copy(), score)
                done.append(sentence)
        return done

    def _advance_beams(self, logits: Floats, rows: Ints, sums: Floats) -> list[Sentence]:
        done = []
        searches = [(sentence, sentence.beam) for sentence in self.running if sentence.beam is not None]
        k = min(max(beam.candidates for _, beam in searches), logits.shape[1])
        if len(rows) < len(logits):
            values, columns = top_k(logits[rows], k)
        else:
            values, columns = top_k(logits, k)  # a copy of the logits less
            values, columns = values[rows], columns[rows]
        values -= sums[rows, None]
        firsts = np.cumsum([0, *(beam.beams for _, beam in searches)])
        fed: list[tuple[Ints, list[int]]] = []
        for size in {beam.beams for _, beam in searches}:
            some = [i for i, (_, beam) in enumerate(searches) if beam.beams == size]
            own = np.concatenate([np.arange(firsts[i], firsts[i] + size) for i in some])
            each = continuations([searches[i][1] for i in some], values[own], columns[own])
            for i, best in zip(some, each):
                sentence, beam = searches[i]
                length = int(self._lengths[sentence.rows[0]])
                going = beam.advance(best, length, lambda n, s=sentence, m=length: self._tokens[s.rows[n], :m])  # type: ignore[misc]
                if going is None:
                    sentence.result = beam.finished[0]
                    done.append(sentence)
                else:
                    self._rearrange(sentence, going[0], length)
                    fed.append((sentence.rows, going[1]))
        if fed:
            going_on = np.concatenate([sentence_rows for sentence_rows, _ in fed])
            self._tokens[going_on, self._lengths[going_on]] = np.concatenate([tokens for _, tokens in fed])
            self._lengths[going_on] += 1
        return done

    def _rearrange(self, sentence: Sentence, parents: list[int], length: int) -> None:
        """Give each new hypothesis a row: its parent's own for the first child, a dropped one's for the others.

        A dropped hypothesis shares its beginning with the one that takes its row, and so do their
        caches: only what comes after is copied.
        """
        old = sentence.rows
        rows = old[parents]
        if len(set(parents)) < len(parents):
            free = [i for i in range(len(parents)) if i not in parents]
            taken: set[int] = set()
            for j, parent in enumerate(parents):
                if parent not in taken:
                    taken.add(parent)
                    continue
                dropped = free.pop()
                source, target = int(old[parent]), int(old[dropped])
                rows[j] = target
                same = self._tokens[source, :length] == self._tokens[target, :length]
                begin = length if same.all() else int(same.argmin())
                self._model.copy(source, target, begin)
                self._tokens[target, begin:length] = self._tokens[source, begin:length]
        sentence.rows = rows

    def _leave(self, sentences: Sequence[Sentence]) -> None:
        if not sentences:
            return
        gone = np.concatenate([s.rows for s in sentences])
        before = self._model.rows
        order = self._model.remove(gone)
        left = len(order)
        for array in (self._tokens, self._lengths, self._sums):
            array[:left] = array[order]
        number = np.empty(before, np.int64)
        number[order] = np.arange(left)
        leaving = set(map(id, sentences))
        self.running = [s for s in self.running if id(s) not in leaving]
        for sentence in self.running:
            sentence.rows = number[sentence.rows]
        self._groups = None

    def _rule_groups(self) -> list[tuple[Rules, Ints]]:
        """The rows that each set of rules holds for."""
        if self._groups is None:
            by_generation: dict[Generation, list[Ints]] = {}
            for sentence in self.running:
                by_generation.setdefault(sentence.generation, []).append(sentence.rows)
                if sentence.generation not in self._rules:
                    self._rules[sentence.generation] = Rules(sentence.generation, self._task.eos_token_ids)
            self._groups = [(self._rules[g], np.concatenate(rows)) for g, rows in by_generation.items()]
        return self._groups

    def _sum_up(self, logits: Floats, rows: NDArray[np.bool_], sums: Floats) -> None:
        """Put the sums of some rows, which make log-probabilities of their logits, into ``sums``."""
        if rows.all():
            sums[:] = self._model.log_sum_exp(logits)
        elif rows.any():
            sums[rows] = self._model.log_sum_exp(logits[rows])

    def _altering(self) -> bool:
        """Whether rules change logits that may be chosen, and not only forbid some."""
        return any(rules.alters for rules, _ in self._rule_groups())


def _of_similar_length(sentences: Sequence[Sentence]) -> Iterator[list[Sentence]]:
    """Groups to encode together: little padding, and no more than ``_TOKENS_PER_ENCODE`` tokens of it."""
    group: list[Sentence] = []
    for sentence in sorted(sentences, key=lambda s: len(s.token_ids)):
        length = len(sentence.token_ids)
        if group and (length > 1.25 * len(group[0].token_ids) + 2 or (len(group) + 1) * length > _TOKENS_PER_ENCODE):
            yield group
            group = []
        group.append(sentence)
    if group:
        yield group
