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
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field, fields
from functools import lru_cache, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deploykit.runtime.choice import Choice, Texts
from deploykit.runtime.engines import DecodeModel, HeldBeam, TakesSteps
from deploykit.runtime.generation import MAX_ROWS
from deploykit.runtime.search import NEVER, Beam, Continuations, Finished, Floats, Ints, Rules, candidates
from deploykit.tasks import Generation, Translation

MAX_CACHE_BYTES = 512 << 20
_TOKENS_PER_ENCODE = 2048
_AT_ONCE_S = 0.002  # for steps that a model takes by itself: who comes meanwhile waits for them
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
    rules: Rules | None = None  # of ``generation``, once it runs
    rows: Ints = field(default_factory=lambda: np.empty(0, np.int64))
    beam: Beam | None = None
    held: HeldBeam | None = None  # the beam, where the model has it


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


@dataclass
class _Plan:
    """The running sentences by how they are searched for; it holds until one joins or leaves.

    ``rules`` with the rows they are for; if what some forbid ``varies`` it does at every step. ``beams``: sentences of one
    beam size, and their rows, [sentences, beams], of which ``Sentence.rows`` are views. ``held``: the model may take several
    steps by itself.
    """

    choice: Choice
    rules: list[tuple[Rules, Ints]]
    greedy: list[Sentence]
    greedy_rows: Ints
    beams: list[tuple[list[Sentence], Ints]]
    varies: bool
    held: bool = False


class Decoder:
    """The sentences ``waiting`` and ``running``, and the model that they run on. One caller at a time.

    ``max_rows`` and ``max_cache_bytes`` bound a step: what does not fit waits, and a sentence that has
    outgrown the room is begun again later. ``run`` may use up to ``workers`` decoders side by side, of
    as many rows each: where sentences are many that is faster than threads within a step.
    """

    def __init__(
        self,
        model: DecodeModel,
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
        self._step_s = _AT_ONCE_S  # the last step's
        self._runner = model if isinstance(model, TakesSteps) else None
        self._task = task
        self._max_cache_bytes = max_cache_bytes
        self._workers = workers
        self._side_by_side: dict[int, list[Decoder]] = {}  # by how many
        self._pool: ThreadPoolExecutor | None = None
        # Of the generations last asked for: clients may ask for any number of them.
        self._rules = lru_cache(maxsize=256)(partial(Rules, eos_token_ids=task.eos_token_ids))
        self._ends = np.zeros(model.vocabulary, bool)
        self._ends[list(task.eos_token_ids)] = True
        # By row: the start token and what was generated since; how many that is, may be, and is when the rules say something
        # else; their log-probability; and what is wanted of a step.
        self._tokens = np.zeros((max_rows, task.max_target_length + 1), np.int64)
        self._lengths, self._limits, self._turns = np.zeros((3, max_rows), np.int64)
        self._sums = np.zeros(max_rows, np.float32)
        self._forced = np.zeros(max_rows, np.int32)
        self._scored, self._before, self._in_beam = np.zeros((3, max_rows), bool)
        self._texts = Texts(self._tokens, self._lengths, self._limits, self._sums, self._ends)
        self._plan: _Plan | None = None

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
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._workers)
        futures = [self._pool.submit(work, decoder) for decoder in decoders]
        try:
            for future in futures:
                future.result()
        except BaseException:
            wait(futures)
            del self._side_by_side[n]  # they still hold sentences
            raise
        for decoder in decoders:
            self.seconds.add(decoder.seconds, 1 / n)
            decoder.seconds = Seconds()

    def step(self) -> list[Sentence]:
        """Let sentences join, feed every row one token or several, and return the sentences that are done with it."""
        started = time.perf_counter()
        self._leave([s for s in self.running if s.cancelled])
        self._join()
        if not self.running:
            return []
        self._make_room()
        encoded = time.perf_counter()
        plan = self._plan = self._plan or self._make_plan()
        alike = self._follow(plan)
        if self._runner is not None and plan.held:
            most = min(alike, max(1, int(_AT_ONCE_S / self._step_s)))
            if plan.beams:
                ((sentences, of_sentences),) = plan.beams
                held = [sentence.held for sentence in sentences]
                steps = self._runner.run_beams(self._texts, plan.choice, of_sentences, held, most)
            else:
                steps = self._runner.run_greedily(self._texts, plan.choice, most)
            stepped = time.perf_counter()
            self._step_s = (stepped - encoded) / steps
            done = self._over(plan) if plan.beams else self._ended(plan)
        else:
            rows = np.arange(self._model.rows)
            values, ids = self._model.choose(self._tokens[rows, self._lengths[rows] - 1], plan.choice)
            stepped = time.perf_counter()
            done = self._choose_greedily(plan, ids[:, 0], values[:, 0]) if plan.greedy else []
            if plan.beams:
                done += self._advance_beams(plan, values, ids)
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
        if not joining:
            return
        rows = self._model.rows + sum(s.generation.beam_size for s in joining)
        self._model.reserve(rows, max(len(s.token_ids) for s in joining))
        for group in _of_similar_length(joining) if self._model.pads else [joining]:
            cross = self._model.encode([s.token_ids for s in group])
            for text, sentence in enumerate(group):
                self._admit(sentence, cross, text)

    def _admit(self, sentence: Sentence, cross: Any, text: int) -> None:
        g = sentence.generation
        sentence.rules = self._rules(g)
        sentence.rows = self._model.admit(cross, text, len(sentence.token_ids), g.beam_size)
        sentence.beam = Beam(g, self._task.eos_token_ids) if g.beam_size > 1 else None
        sentence.held = None
        first, last = int(sentence.rows[0]), self._model.rows
        self._tokens[first:last, 0] = self._task.decoder_start_token_id
        self._lengths[first:last] = 1
        self._limits[first:last] = g.max_length
        self._sums[first] = 0.0
        self._sums[first + 1 : last] = NEVER  # all hypotheses begin alike: one is continued at first
        self._scored[first:last] = sentence.scored or g.beam_size > 1
        self._before[first:last] = not g.renormalize
        self._in_beam[first:last] = g.beam_size > 1
        self.running.append(sentence)
        self._plan = None

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

    def _follow(self, plan: _Plan) -> int:
        """Have ``plan.choice`` say what the rules say of this step; returns for how many steps they say the same."""
        choice, rows = plan.choice, self._model.rows
        lengths, turns = self._lengths[:rows], self._turns[:rows]
        if choice.changed and not plan.varies and (alike := int((turns - lengths).min())) > 0:
            return alike
        choice.penalties = []
        forbidden: list[list[int]] = [[]] * rows
        for rules, theirs in plan.rules:
            choice.forced[theirs] = rules.forced(lengths[theirs])
            turns[theirs] = rules.turn(lengths[theirs])
            for row in theirs.tolist():
                tokens = self._tokens[row, : lengths[row]]
                forbidden[row] = rules.forbidden(tokens)
                if rules.penalty != 1.0:
                    choice.penalties.append((row, np.unique(tokens), rules.penalty))
        choice.forbidden, choice.begin = _in_turn(forbidden)
        choice.changed += 1
        return int((turns - lengths).min())

    def _make_plan(self) -> _Plan:
        rows = self._model.rows
        by_rules: dict[Rules, list[Ints]] = {}
        greedy: list[Sentence] = []
        sizes: dict[int, list[Sentence]] = {}
        for sentence in self.running:
            assert sentence.rules is not None
            by_rules.setdefault(sentence.rules, []).append(sentence.rows)
            (greedy if sentence.beam is None else sizes.setdefault(sentence.generation.beam_size, [])).append(sentence)
        nothing = np.empty(0, np.int32)  # what is forbidden comes with the first step
        choice = Choice(
            1, self._forced[:rows], nothing, nothing, self._scored[:rows], self._before[:rows], self._in_beam[:rows]
        )
        plan = _Plan(
            choice,
            [(rules, np.concatenate(parts)) for rules, parts in by_rules.items()],
            greedy,
            np.concatenate([sentence.rows for sentence in greedy]) if greedy else np.empty(0, np.int64),
            [],
            varies=any(rules.vary for rules in by_rules),
        )
        for size, sentences in sizes.items():
            together = np.stack([sentence.rows for sentence in sentences])
            for sentence, beam_rows in zip(sentences, together):
                sentence.rows = beam_rows
            plan.beams.append((sentences, together))
            choice.best = max(choice.best, min(candidates(size, self._task.eos_token_ids), self._model.vocabulary))
        if self._runner is not None:
            plan.held = self._held(plan)
        return plan

    def _held(self, plan: _Plan) -> bool:
        """Whether the model may take steps by itself. Beams are then in its hands, and otherwise in ours."""
        assert self._runner is not None
        one_kind = len(plan.beams) + bool(plan.greedy) == 1 and not plan.varies
        sentences = [sentence for group, _ in plan.beams for sentence in group]
        for sentence in sentences:
            assert sentence.beam is not None
            if one_kind and sentence.held is None:
                sentence.held = self._runner.hold_beam(sentence.beam)
            elif not one_kind and sentence.held is not None:
                sentence.beam, sentence.held = sentence.held.give_back(), None
        return one_kind and all(sentence.held is not None for sentence in sentences)

    def _over(self, plan: _Plan) -> list[Sentence]:
        """Of the sentences in the model's hands those whose search is over, with their results."""
        done = []
        for sentence in (sentence for group, _ in plan.beams for sentence in group):
            if sentence.held is not None and sentence.held.done:
                sentence.result = sentence.held.give_back().finished[0]
                done.append(sentence)
        return done

    def _choose_greedily(self, plan: _Plan, chosen: Ints, gained: Floats) -> list[Sentence]:
        """``chosen`` tokens by row, and their log-probabilities, which count where a score is wanted."""
        rows = plan.greedy_rows
        lengths, tokens = self._lengths[rows], chosen[rows]
        self._sums[rows] += np.where(plan.choice.scored[rows], gained[rows], np.float32(0))
        self._tokens[rows, lengths] = tokens
        self._lengths[rows] = lengths + 1
        return self._ended(plan)

    def _ended(self, plan: _Plan) -> list[Sentence]:
        """Of the sentences searched greedily those that are at their ends, with their results."""
        rows = plan.greedy_rows
        lengths = self._lengths[rows]
        done = []
        for i in np.flatnonzero(self._ends[self._tokens[rows, lengths - 1]] | (lengths >= self._limits[rows])):
            sentence, row, length = plan.greedy[i], int(rows[i]), int(lengths[i])
            score = float(self._sums[row]) / (length - 1) ** sentence.generation.length_penalty
            sentence.result = Finished(self._tokens[row, 1:length].copy(), score)
            done.append(sentence)
        return done

    def _advance_beams(self, plan: _Plan, values: Floats, columns: Ints) -> list[Sentence]:
        """``values`` and ``columns``: log-probabilities and ids of the best tokens of each row, best first."""
        done = []
        for sentences, rows in plan.beams:
            n, size = rows.shape
            totals = (self._sums[rows][:, :, None] + values[rows]).reshape(n, -1)
            count = candidates(size, self._task.eos_token_ids)
            best = np.argsort(-totals, axis=1, kind="stable")[:, :count]
            each = np.arange(n)[:, None]
            parents, scores = best // values.shape[1], totals[each, best]
            tokens = columns[rows[each, parents], best % values.shape[1]]
            lengths = self._lengths[rows[:, 0]]
            ending = self._ends[tokens].any(axis=1) | (lengths + 1 >= self._limits[rows[:, 0]])
            going = np.ones(n, bool)
            for i, sentence in enumerate(sentences):
                beam = sentence.beam
                assert beam is not None
                if not ending[i] and not beam.finished:
                    continue  # the first of the best go on
                length = int(lengths[i])
                hypotheses = self._tokens[rows[i], :length]
                found = Continuations(parents[i].tolist(), tokens[i].tolist(), scores[i].tolist())
                following = beam.advance(found, length, hypotheses)
                if following is None:
                    sentence.result = beam.finished[0]
                    done.append(sentence)
                    going[i] = False
                else:
                    parents[i, :size], tokens[i, :size] = following.parents, following.tokens
                    scores[i, :size] = following.scores
            if going.any():
                lengths = lengths[going]
                rows[going] = now = self._rearrange(rows[going], parents[going, :size], lengths)
                self._tokens[now, lengths[:, None]] = tokens[going, :size]
                self._lengths[now] = lengths[:, None] + 1
                self._sums[now] = scores[going, :size]
        return done

    def _rearrange(self, rows: Ints, parents: Ints, lengths: Ints) -> Ints:
        """Give each new hypothesis, [sentences, beams], a row: its parent's own for the first child, a dropped one's for
        the others.

        A dropped hypothesis shares its beginning with the one that takes its row, and so do their
        caches: only what comes after is copied.
        """
        now: Ints = rows[np.arange(len(rows))[:, None], parents]
        forked = (np.sort(parents, axis=1) != np.arange(rows.shape[1])).any(axis=1)
        if not forked.any():
            return now
        sources, targets = [], []
        for i in np.flatnonzero(forked):
            each = parents[i].tolist()
            dropped = [j for j in range(len(each)) if j not in each]
            taken: set[int] = set()
            for j, parent in enumerate(each):
                if parent in taken:
                    now[i, j] = rows[i, dropped.pop()]
                    sources.append(rows[i, parent])
                    targets.append(now[i, j])
                taken.add(parent)
        source, target, longest = np.array(sources), np.array(targets), int(lengths[forked].max())
        same = self._tokens[source, :longest] == self._tokens[target, :longest]
        begin = int(np.where(same.all(axis=1), longest, same.argmin(axis=1)).min())
        self._model.copy(source, target, begin)
        self._tokens[target, begin:longest] = self._tokens[source, begin:longest]
        return now

    def _leave(self, sentences: Sequence[Sentence]) -> None:
        if not sentences:
            return
        order = self._model.remove(np.concatenate([s.rows for s in sentences]))
        moved = np.flatnonzero(order != np.arange(len(order)))
        leaving = set(map(id, sentences))
        self.running = [s for s in self.running if id(s) not in leaving]
        self._plan = None
        if not len(moved):
            return
        before = order[moved]
        for array in (self._tokens, self._lengths, self._limits, self._sums, self._scored, self._before, self._in_beam):
            array[moved] = array[before]
        number = np.arange(self.max_rows)
        number[before] = moved
        for sentence in self.running:
            sentence.rows = number[sentence.rows]


def _in_turn(tokens: Sequence[Sequence[int]]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Tokens of rows one after another, and where each row's begin."""
    begin = np.zeros(len(tokens) + 1, np.int32)
    np.cumsum([len(row) for row in tokens], out=begin[1:])
    return np.array([token for row in tokens for token in row], np.int32), begin


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
