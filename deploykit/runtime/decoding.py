"""Decode sentences in a running batch, which sentences join and leave between steps.

A step feeds every running row its last token. Waiting sentences join as soon as there is room, and finished ones leave
immediately, so no row is wasted. A sentence's tokens and score do not depend on the other rows of the batch.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from functools import lru_cache, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deploykit.runtime.engines.protocol import DecodeModel, HeldBeam, MultiStepModel, SearchState, TokenSelection
from deploykit.runtime.generation import MAX_ROWS, DecodedTask, Generation
from deploykit.runtime.search import NEVER, Beam, Continuations, Finished, Floats, Ints, Rules, candidates

MAX_CACHE_BYTES = 1 << 30
_TOKENS_PER_ENCODE = 2048
_MULTI_STEP_S = 0.002  # how long a model may take steps by itself; requests that arrive meanwhile have to wait
_JOIN_SHARE = 8  # a full batch admits sentences when an eighth of its rows is free: encoding them one by one is slow


@dataclass
class Sentence:
    """One source sentence, from the queue to its result.

    ``token_ids`` include the special tokens. ``result`` is set when the sentence is done. ``scored``: compute the
    score, which costs a pass over the vocabulary. ``cancelled`` may be set at any time: the sentence then leaves
    without a result.
    """

    token_ids: Sequence[int]
    generation: Generation
    scored: bool = True
    cancelled: bool = False
    result: Finished | None = None
    text: str | None = None  # translation, once detokenized
    rules: Rules | None = None  # compiled from ``generation`` when the sentence is admitted
    rows: Ints = field(default_factory=lambda: np.empty(0, np.int64))
    beam: Beam | None = None
    held: HeldBeam | None = None  # the beam, while the model holds it

    @property
    def claims(self) -> int:
        """Number of rows that the sentence takes."""
        return self.generation.beam_size


@dataclass
class Seconds:
    """Time that a translator spent, in seconds. Its decoder counts ``encoder``, ``decoder`` and ``search``."""

    tokenizing: float = 0.0
    encoder: float = 0.0
    decoder: float = 0.0
    search: float = 0.0
    detokenizing: float = 0.0

    @contextmanager
    def counting(self, name: str) -> Iterator[None]:
        """Add the duration of the block to ``name``."""
        started = time.perf_counter()
        try:
            yield
        finally:
            setattr(self, name, getattr(self, name) + time.perf_counter() - started)

    def add(self, other: Seconds, share: float) -> None:
        """Add ``share`` of each figure of ``other``."""
        for field_ in fields(self):
            setattr(self, field_.name, getattr(self, field_.name) + share * getattr(other, field_.name))


def longest_first(sentences: Iterable[Sentence]) -> list[Sentence]:
    """Sort by length, longest first, so that short sentences fill the room left at the end."""
    return sorted(sentences, key=lambda sentence: -len(sentence.token_ids))


@dataclass
class _Plan:
    """The running sentences, grouped by search method. Valid until a sentence joins or leaves.

    - ``rules``: the rules in use, each with its rows.
    - ``varies``: some rules depend on the tokens generated, so they must be applied again at every step.
    - ``greedy``: rows of greedy search.
    - ``beams``: sentences of one beam size with their rows, [sentences, beams]; ``Sentence.rows`` are views of it.
    - ``held``: the model may take several steps by itself.
    """

    selection: TokenSelection
    rules: list[tuple[Rules, Ints]]
    greedy: Ints
    beams: list[tuple[list[Sentence], Ints]]
    varies: bool
    held: bool = False


class Decoder:
    """The ``waiting`` and ``running`` sentences, and the model that runs them. One caller at a time.

    ``max_rows`` and ``max_cache_bytes`` bound a step. Sentences that do not fit wait; a running sentence whose caches
    no longer fit is started again later. ``run`` may use up to ``workers`` decoders side by side, each with
    ``max_rows`` rows: for many sentences that is faster than threads within a step.
    """

    def __init__(
        self,
        model: DecodeModel,
        task: DecodedTask,
        *,
        max_rows: int = MAX_ROWS,
        max_cache_bytes: int = MAX_CACHE_BYTES,
        workers: int = 1,
    ) -> None:
        self.waiting: deque[Sentence] = deque()
        self.running: list[Sentence] = []
        self._successors: deque[tuple[Sentence, Any]] = (
            deque()
        )  # already encoded; they take over the rows of finished sentences
        self.seconds = Seconds()
        self.tokens = 0  # one for each sentence and step
        self.max_rows = max_rows
        self.model = model
        self._step_s = _MULTI_STEP_S  # duration of the last step
        self._runner = model if isinstance(model, MultiStepModel) else None
        self._task = task
        self._max_cache_bytes = max_cache_bytes
        self._workers = workers
        self._side_by_side: dict[int, list[Decoder]] = {}  # by number of decoders
        self._pool: ThreadPoolExecutor | None = None
        # A cache of bounded size: clients may send any number of generation configs.
        self._rules = lru_cache(maxsize=256)(partial(Rules, eos_token_ids=task.eos_token_ids))
        self._ends = np.zeros(model.vocabulary, bool)
        self._ends[list(task.eos_token_ids)] = True
        # State of each row: its tokens, from the start token on; their number, its limit, and the number at which the
        # rules change; what to compute in a step; the sum of log-probabilities; a forced token; and its sentence.
        self._tokens = np.zeros((max_rows, task.max_target_length + 1), np.int64)
        self._counts, self._flags = np.zeros((3, max_rows), np.int64), np.zeros((3, max_rows), bool)
        self._lengths, self._limits, self._rules_change = self._counts
        self._scored, self._before, self._in_beam = self._flags
        self._sums = np.zeros(max_rows, np.float32)
        self._forced = np.zeros(max_rows, np.int32)
        self._sentence_of: list[Sentence] = []
        self._state = SearchState(self._tokens, self._lengths, self._limits, self._sums, self._ends)
        self._plan: _Plan | None = None

    @property
    def claimed(self) -> int:
        """Number of rows that the running and waiting sentences take."""
        return self.model.rows + len(self._successors) + sum(s.generation.beam_size for s in self.waiting)

    @property
    def cache_use(self) -> float:
        """Share of the memory for caches that the running sentences take, 0 to 1."""
        return self._cache_bytes() / self._max_cache_bytes if self.running else 0.0

    def add(self, sentence: Sentence) -> None:
        """Append ``sentence`` to the waiting ones."""
        self.waiting.append(sentence)

    def run(self, sentences: Iterable[Sentence], finish: Callable[[Sentence], None] = lambda sentence: None) -> None:
        """Decode all ``sentences``, and call ``finish`` with each as it is done.

        Decoders that run side by side take sentences as they have room, and finish their own. So one can tokenize while
        the others compute.
        """
        with self.seconds.counting("tokenizing"):
            coming = iter(sentences)
            first, rows = [], 0
            while rows < self._workers * self.max_rows and (sentence := next(coming, None)):
                first.append(sentence)
                rows += sentence.generation.beam_size
        workers = min(self._workers, rows // self.model.rows_of_a_worker)
        if workers > 1:
            self._run_side_by_side(longest_first(first), coming, finish, workers)
            return
        with self.seconds.counting("tokenizing"):
            self.waiting.extend(longest_first([*first, *coming]))
        while self.waiting or self.running:
            done = self.step()
            with self.seconds.counting("detokenizing"):
                for sentence in done:
                    finish(sentence)

    def _run_side_by_side(
        self, first: Sequence[Sentence], coming: Iterator[Sentence], finish: Callable[[Sentence], None], n: int
    ) -> None:
        if n not in self._side_by_side:
            self._side_by_side[n] = [
                Decoder(model, self._task, max_rows=self.max_rows, max_cache_bytes=self._max_cache_bytes // n)
                for model in self.model.side_by_side(n)
            ]
        decoders = self._side_by_side[n]
        for i, sentence in enumerate(first):
            decoders[i % n].add(sentence)
        most = self.max_rows + 2 * self.max_rows // _JOIN_SHARE  # some are encoded ahead and wait for a row
        taking, failed = threading.Lock(), False

        def work(decoder: Decoder) -> None:
            nonlocal failed
            try:
                while decoder.waiting or decoder.running:
                    done = decoder.step()
                    with taking, decoder.seconds.counting("tokenizing"):
                        while not failed and decoder.claimed < most and (sentence := next(coming, None)):
                            decoder.add(sentence)
                    with decoder.seconds.counting("detokenizing"):
                        for sentence in done:
                            finish(sentence)
            except BaseException:
                failed = True  # stops the other decoders
                raise

        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._workers)
        futures = [self._pool.submit(work, decoder) for decoder in decoders]
        try:
            for future in futures:
                future.result()
        except BaseException:
            failed = True
            wait(futures)
            del self._side_by_side[n]  # their state is unusable: they still hold sentences
            raise
        for decoder in decoders:
            self.seconds.add(decoder.seconds, 1 / n)
            decoder.seconds = Seconds()

    def step(self) -> list[Sentence]:
        """Let sentences join, feed every row one or more tokens, and return the finished sentences."""
        started = time.perf_counter()
        self._leave([s for s in self.running if s.cancelled])
        self._join()
        if not self.running:
            return []
        self._make_room()
        encoded = time.perf_counter()
        plan = self._plan = self._plan or self._make_plan()
        same_for = self._update_selection(plan)
        if self._runner is not None and plan.held:
            most = min(same_for, max(1, int(_MULTI_STEP_S / self._step_s)))
            if plan.beams:
                ((sentences, of_sentences),) = plan.beams
                held = [sentence.held for sentence in sentences]
                steps = self._runner.run_beams(self._state, plan.selection, of_sentences, held, most)
            else:
                steps = self._runner.run_greedily(self._state, plan.selection, most)
            stepped = time.perf_counter()
            self._step_s = (stepped - encoded) / steps
            done = self._finished_beams(plan) if plan.beams else self._finished_greedy(plan)
        else:
            rows = np.arange(self.model.rows)
            values, ids = self.model.choose(self._tokens[rows, self._lengths[rows] - 1], plan.selection)
            stepped = time.perf_counter()
            done = self._choose_greedily(plan, ids[:, 0], values[:, 0]) if len(plan.greedy) else []
            if plan.beams:
                done += self._advance_beams(plan, values, ids)
        self.seconds.encoder += encoded - started
        self.seconds.decoder += stepped - encoded
        self.seconds.search += time.perf_counter() - stepped
        self.tokens += len(self.running)
        self._leave(done if plan.beams else self._reuse_rows(plan, done))
        return done

    def _join(self) -> None:
        """Move waiting sentences into the batch while rows and cache memory allow it."""
        if not self.running:
            self._recall_successors()  # the sentences they were to replace were all cancelled
        free = self.max_rows - self.model.rows
        if not self.waiting or (self.running and free < self.max_rows // _JOIN_SHARE):
            return
        joining: list[Sentence] = []
        longest, rows = max((len(s.token_ids) for s in self.running), default=0), self.model.rows
        while self.waiting:
            sentence = self.waiting[0]
            if sentence.cancelled:
                self.waiting.popleft()
                continue
            longest = max(longest, len(sentence.token_ids))
            more = rows + sentence.generation.beam_size
            crowded = more > self.max_rows or self.model.cache_bytes(more, longest, longest) > self._max_cache_bytes
            if crowded and (self.running or joining):
                break
            joining.append(self.waiting.popleft())
            rows = more
        if not joining:
            return
        self.model.reserve(rows, max(len(s.token_ids) for s in joining))
        for group in _of_similar_length(joining) if self.model.pads else [joining]:
            self._admit(group, self.model.encode([s.token_ids for s in group]))

    def _admit(self, sentences: Sequence[Sentence], cross: Any) -> None:
        """Assign new rows to ``sentences``, whose encoded texts are ``cross``."""
        first = last = self.model.rows
        for sentence in sentences:
            g = sentence.generation
            sentence.rules = self._rules(g)
            sentence.rows = np.arange(last, last + g.beam_size)
            sentence.beam = Beam(g, self._task.eos_token_ids) if g.beam_size > 1 else None
            sentence.held = None
            self._sentence_of += [sentence] * g.beam_size
            last += g.beam_size
        self.model.admit(cross, [len(s.token_ids) for s in sentences], [s.generation.beam_size for s in sentences])
        rows, theirs = np.arange(first, last), self._sentence_of[first:]
        self._begin(rows)
        self._limits[rows] = [s.generation.max_length for s in theirs]
        self._scored[rows] = [s.scored or s.beam is not None for s in theirs]
        self._before[rows] = [not s.generation.renormalize for s in theirs]
        self._in_beam[rows] = [s.beam is not None for s in theirs]
        for sentence in sentences:
            self._sums[sentence.rows[1:]] = NEVER  # all hypotheses start equal: continue only the first
        self.running += sentences
        self._plan = None

    def _reuse_rows(self, plan: _Plan, done: list[Sentence]) -> list[Sentence]:
        """Reuse the rows of ``done`` for waiting sentences, if the plan is valid for them too.

        That costs a fraction of leaving and joining. Returns the sentences of ``done`` whose rows are still to be
        freed.
        """
        if not done or not (self.waiting or self._successors):
            return done
        rules = plan.rules[0][0]
        fits = (
            plan.held
            and len(plan.rules) == 1
            and int(self._lengths[plan.greedy].max()) < int(rules.next_change(np.array(1)))
        )
        replacements: list[tuple[Sentence, Any]] = []
        while fits and len(replacements) < len(done) and (self._successors or self._encode_successors(rules)):
            sentence, cross = self._successors.popleft()
            if not sentence.cancelled:
                replacements.append((sentence, cross))
        if not fits or not replacements:
            self._recall_successors()
            return done
        rows = np.concatenate([sentence.rows for sentence in done[: len(replacements)]])
        assert self._runner is not None
        self._runner.replace(
            rows, [cross for _, cross in replacements], [len(sentence.token_ids) for sentence, _ in replacements]
        )
        self._begin(rows)
        leaving = set(map(id, done[: len(replacements)]))
        self.running = [s for s in self.running if id(s) not in leaving]
        for row, (sentence, _) in zip(rows.tolist(), replacements):
            sentence.rules, sentence.rows = rules, np.array([row])
            self._scored[row], self._sentence_of[row] = sentence.scored, sentence
            self.running.append(sentence)
        return done[len(replacements) :]

    def _encode_successors(self, rules: Rules) -> bool:
        """Encode some waiting sentences that have the same ``rules``. False if the next one has others."""
        some: list[Sentence] = []
        longest = max(len(s.token_ids) for s in self.running)
        while self.waiting and len(some) < max(1, self.max_rows // _JOIN_SHARE):
            longest = max(longest, len(self.waiting[0].token_ids))
            crowded = self.model.cache_bytes(self.model.rows, longest, longest) > self._max_cache_bytes
            if crowded or self._rules(self.waiting[0].generation) is not rules:
                break
            some.append(self.waiting.popleft())
        if some:
            with self.seconds.counting("encoder"):
                self._successors.extend(zip(some, self.model.encode([s.token_ids for s in some])))
        return bool(some)

    def _recall_successors(self) -> None:
        """Put the encoded successors back at the head of the queue."""
        self.waiting.extendleft(sentence for sentence, _ in reversed(self._successors))
        self._successors.clear()

    def _begin(self, rows: Ints) -> None:
        """Reset ``rows`` to the start token."""
        self._tokens[rows, 0] = self._task.decoder_start_token_id
        self._lengths[rows] = 1
        self._sums[rows] = 0.0

    def _make_room(self) -> None:
        """Move the youngest sentences back to the queue while the caches of this step are too large."""
        while len(self.running) > 1 and self._cache_bytes() > self._max_cache_bytes:
            youngest = self.running[-1]
            self._leave([youngest])
            self.waiting.appendleft(youngest)

    def _cache_bytes(self) -> int:
        """Return the size of the caches of this step."""
        rows = self.model.rows
        longest = int(self._lengths[:rows].max())
        source = max(len(s.token_ids) for s in self.running)
        return self.model.cache_bytes(rows, longest, source)

    def _update_selection(self, plan: _Plan) -> int:
        """Update ``plan.selection`` for this step. Returns the number of steps for which it stays valid."""
        selection, rows = plan.selection, self.model.rows
        lengths, turns = self._lengths[:rows], self._rules_change[:rows]
        if selection.changed and not plan.varies and (same_for := int((turns - lengths).min())) > 0:
            return same_for
        selection.penalties = []
        forbidden: list[list[int]] = [[]] * rows
        for rules, theirs in plan.rules:
            of_theirs = lengths[theirs]
            selection.forced[theirs] = rules.forced(of_theirs)
            turns[theirs] = rules.next_change(of_theirs)
            for row, length in zip(theirs.tolist(), of_theirs.tolist()):
                if not rules.vary:
                    forbidden[row] = rules.always(length)
                    continue
                tokens = self._tokens[row, :length]
                forbidden[row] = rules.forbidden(tokens)
                if rules.penalty != 1.0:
                    selection.penalties.append((row, np.unique(tokens), rules.penalty))
        selection.forbidden, selection.begin = _concatenate(forbidden)
        selection.changed += 1
        return int((turns - lengths).min())

    def _make_plan(self) -> _Plan:
        """Group the running sentences by rules and search method."""
        rows = self.model.rows
        by_rules: dict[Rules, list[int]] = {}
        for row, sentence in enumerate(self._sentence_of):
            assert sentence.rules is not None
            by_rules.setdefault(sentence.rules, []).append(row)
        sizes: dict[int, list[Sentence]] = {}
        for sentence in self.running:
            if sentence.beam is not None:
                sizes.setdefault(sentence.generation.beam_size, []).append(sentence)
        greedy = np.flatnonzero(~self._in_beam[:rows])
        nothing = np.empty(0, np.int32)  # the first step fills in the forbidden tokens
        selection = TokenSelection(
            1, self._forced[:rows], nothing, nothing, self._scored[:rows], self._before[:rows], self._in_beam[:rows]
        )
        plan = _Plan(
            selection,
            [(rules, np.array(theirs)) for rules, theirs in by_rules.items()],
            greedy,
            [],
            varies=any(rules.vary for rules in by_rules),
        )
        for size, sentences in sizes.items():
            together = np.stack([sentence.rows for sentence in sentences])
            for sentence, beam_rows in zip(sentences, together):
                sentence.rows = beam_rows
            plan.beams.append((sentences, together))
            selection.best = max(selection.best, min(candidates(size, self._task.eos_token_ids), self.model.vocabulary))
        if self._runner is not None:
            plan.held = self._hand_over_beams(plan)
        return plan

    def _hand_over_beams(self, plan: _Plan) -> bool:
        """Return whether the model may take steps by itself.

        If so, hand the beams over to the model; otherwise take them back.
        """
        assert self._runner is not None
        one_kind = len(plan.beams) + bool(len(plan.greedy)) == 1 and not plan.varies
        sentences = [sentence for group, _ in plan.beams for sentence in group]
        for sentence in sentences:
            assert sentence.beam is not None
            if one_kind and sentence.held is None:
                sentence.held = self._runner.hold_beam(sentence.beam)
            elif not one_kind and sentence.held is not None:
                sentence.beam, sentence.held = sentence.held.give_back(), None
        return one_kind and all(sentence.held is not None for sentence in sentences)

    def _finished_beams(self, plan: _Plan) -> list[Sentence]:
        """Return the finished sentences among the beams that the model holds, with their results."""
        done = []
        for sentence in (sentence for group, _ in plan.beams for sentence in group):
            if sentence.held is not None and sentence.held.done:
                sentence.result = sentence.held.give_back().finished[0]
                done.append(sentence)
        return done

    def _choose_greedily(self, plan: _Plan, chosen: Ints, gained: Floats) -> list[Sentence]:
        """Append the ``chosen`` token to each greedy row, and its log-probability to the score where one is
        requested."""
        rows = plan.greedy
        lengths, tokens = self._lengths[rows], chosen[rows]
        self._sums[rows] += np.where(plan.selection.scored[rows], gained[rows], np.float32(0))
        self._tokens[rows, lengths] = tokens
        self._lengths[rows] = lengths + 1
        return self._finished_greedy(plan)

    def _finished_greedy(self, plan: _Plan) -> list[Sentence]:
        """Return the finished greedy sentences, with their results."""
        rows = plan.greedy
        lengths = self._lengths[rows]
        done = []
        for row in rows[self._ends[self._tokens[rows, lengths - 1]] | (lengths >= self._limits[rows])].tolist():
            sentence, length = self._sentence_of[row], int(self._lengths[row])
            score = float(self._sums[row]) / (length - 1) ** sentence.generation.length_penalty
            sentence.result = Finished(self._tokens[row, 1:length].copy(), score)
            done.append(sentence)
        return done

    def _advance_beams(self, plan: _Plan, values: Floats, columns: Ints) -> list[Sentence]:
        """Advance every beam by one step. Returns the finished sentences.

        ``values`` and ``columns`` are log-probabilities and ids of each row's best tokens, best first.
        """
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
                    continue  # the best ones continue as they are
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
        """Assign a row to each new hypothesis, [sentences, beams].

        A parent's first child keeps the parent's row; further children get the rows of dropped hypotheses. A dropped
        hypothesis shares its beginning with the new one, and so do their caches: only the positions after it are
        copied.
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
        self.model.copy(source, target, begin)
        self._tokens[target, begin:longest] = self._tokens[source, begin:longest]
        return now

    def _leave(self, sentences: Sequence[Sentence]) -> None:
        """Remove ``sentences`` and their rows from the batch."""
        if not sentences:
            return
        order = self.model.remove(np.concatenate([s.rows for s in sentences]))
        leaving = set(map(id, sentences))
        self.running = [s for s in self.running if id(s) not in leaving]
        self._plan = None
        moved = np.flatnonzero(order != np.arange(len(order)))
        if len(moved):
            before = order[moved]
            longest = int(self._lengths[before].max())
            self._tokens[moved, :longest] = self._tokens[before, :longest]
            self._counts[:, moved] = self._counts[:, before]
            self._flags[:, moved] = self._flags[:, before]
            self._sums[moved] = self._sums[before]
            for row, was in zip(moved.tolist(), before.tolist()):
                sentence = self._sentence_of[row] = self._sentence_of[was]
                sentence.rows[sentence.rows == was] = row
        del self._sentence_of[len(order) :]


def _concatenate(tokens: Sequence[Sequence[int]]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Concatenate the rows' tokens. Returns them, and the index at which each row begins."""
    begin = np.zeros(len(tokens) + 1, np.int32)
    np.cumsum([len(row) for row in tokens], out=begin[1:])
    return np.array([token for row in tokens for token in row], np.int32), begin


def _of_similar_length(sentences: Sequence[Sentence]) -> Iterator[list[Sentence]]:
    """Yield groups of similar length to encode together: little padding, at most ``_TOKENS_PER_ENCODE`` tokens."""
    group: list[Sentence] = []
    for sentence in sorted(sentences, key=lambda s: len(s.token_ids)):
        length = len(sentence.token_ids)
        if group and (length > 1.25 * len(group[0].token_ids) + 2 or (len(group) + 1) * length > _TOKENS_PER_ENCODE):
            yield group
            group = []
        group.append(sentence)
    if group:
        yield group
