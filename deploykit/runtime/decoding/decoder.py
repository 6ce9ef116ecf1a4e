"""The running batch: sentences wait, join, take steps and leave."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from typing import Any

import numpy as np

from deploykit.runtime.decoding.advance import advance_beams, choose_greedily, finished_beams, finished_greedy
from deploykit.runtime.decoding.plan import Plan, make_plan
from deploykit.runtime.decoding.rows import Rows
from deploykit.runtime.decoding.sentence import Seconds, Sentence, longest_first, of_similar_length
from deploykit.runtime.decoding.side_by_side import run_side_by_side
from deploykit.runtime.engines.protocol import DecodeModel, MultiStepModel
from deploykit.runtime.generation import MAX_ROWS, DecodedTask
from deploykit.runtime.search import Beam, Rules

MAX_CACHE_BYTES = 1 << 30
_MULTI_STEP_S = 0.002  # how long a model may take steps by itself; requests that arrive in this time have to wait
_JOIN_SHARE = 8  # a full batch admits sentences when an eighth of its rows is free: encoding them one by one is slow


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
        # Sentences that are already encoded; they take over the rows of finished ones.
        self._successors: deque[tuple[Sentence, Any]] = deque()
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
        self._compiled = lru_cache(maxsize=256)(partial(Rules, eos_token_ids=task.eos_token_ids))
        self._rows = Rows(task, max_rows, model.vocabulary)
        self._plan: Plan | None = None

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
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._workers)
        decoders = self._side_by_side[n]
        most = self.max_rows + 2 * self.max_rows // _JOIN_SHARE  # some are encoded ahead and wait for a row
        try:
            run_side_by_side(decoders, first, coming, finish, most=most, pool=self._pool)
        except BaseException:
            del self._side_by_side[n]  # their state is unusable, because they still contain sentences
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
        rows = self._rows
        encoded = time.perf_counter()
        plan = self._plan = self._plan or make_plan(self.running, rows, self._runner)
        same_for = plan.update_selection(rows)
        if self._runner is not None and plan.held:
            most = min(same_for, max(1, int(_MULTI_STEP_S / self._step_s)))
            if plan.beams:
                ((sentences, of_sentences),) = plan.beams
                held = [sentence.held for sentence in sentences]
                steps = self._runner.run_beams(rows.search, plan.selection, of_sentences, held, most)
            else:
                steps = self._runner.run_greedily(rows.search, plan.selection, most)
            stepped = time.perf_counter()
            self._step_s = (stepped - encoded) / steps
            done = finished_beams(plan) if plan.beams else finished_greedy(plan, rows)
        else:
            each = np.arange(self.model.rows)
            values, ids = self.model.choose(rows.tokens[each, rows.lengths[each] - 1], plan.selection)
            stepped = time.perf_counter()
            done = choose_greedily(plan, rows, ids[:, 0], values[:, 0]) if len(plan.greedy) else []
            if plan.beams:
                done += advance_beams(plan, rows, self.model, values, ids)
        self.seconds.encoder += encoded - started
        self.seconds.decoder += stepped - encoded
        self.seconds.search += time.perf_counter() - stepped
        self.tokens += len(self.running)
        self._leave(done if plan.beams else self._reuse_rows(plan, done))
        return done

    def _join(self) -> None:
        """Move waiting sentences into the batch while rows and cache memory allow it."""
        if not self.running:
            self._recall_successors()  # all sentences that they were to replace were cancelled
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
        for group in of_similar_length(joining) if self.model.pads else [joining]:
            self._admit(group, self.model.encode([s.token_ids for s in group]))

    def _admit(self, sentences: Sequence[Sentence], cross: Any) -> None:
        """Assign new rows to ``sentences``, whose encoded texts are ``cross``."""
        self.model.admit(cross, [len(s.token_ids) for s in sentences], [s.claims for s in sentences])
        for sentence in sentences:
            g = sentence.generation
            sentence.rules = self._compiled(g)
            sentence.beam = Beam(g, self._task.eos_token_ids) if g.beam_size > 1 else None
            sentence.held = None
        self._rows.append(sentences)
        self.running += sentences
        self._plan = None

    def _reuse_rows(self, plan: Plan, done: list[Sentence]) -> list[Sentence]:
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
            and int(self._rows.lengths[plan.greedy].max()) < int(rules.next_change(np.array(1)))
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
        self._rows.begin(rows)
        leaving = set(map(id, done[: len(replacements)]))
        self.running = [s for s in self.running if id(s) not in leaving]
        for row, (sentence, _) in zip(rows.tolist(), replacements):
            sentence.rules = rules
            self._rows.replace(row, sentence)
            self.running.append(sentence)
        return done[len(replacements) :]

    def _encode_successors(self, rules: Rules) -> bool:
        """Encode some waiting sentences that have the same ``rules``. False if the next one has others."""
        some: list[Sentence] = []
        longest = max(len(s.token_ids) for s in self.running)
        while self.waiting and len(some) < max(1, self.max_rows // _JOIN_SHARE):
            longest = max(longest, len(self.waiting[0].token_ids))
            crowded = self.model.cache_bytes(self.model.rows, longest, longest) > self._max_cache_bytes
            if crowded or self._compiled(self.waiting[0].generation) is not rules:
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

    def _make_room(self) -> None:
        """Move the youngest sentences back to the queue while the caches of this step are too large."""
        while len(self.running) > 1 and self._cache_bytes() > self._max_cache_bytes:
            youngest = self.running[-1]
            self._leave([youngest])
            self.waiting.appendleft(youngest)

    def _cache_bytes(self) -> int:
        """Return the size of the caches of this step."""
        rows = self.model.rows
        longest = int(self._rows.lengths[:rows].max())
        source = max(len(s.token_ids) for s in self.running)
        return self.model.cache_bytes(rows, longest, source)

    def _leave(self, sentences: Sequence[Sentence]) -> None:
        """Remove ``sentences`` and their rows from the batch."""
        if not sentences:
            return
        order = self.model.remove(np.concatenate([s.rows for s in sentences]))
        leaving = set(map(id, sentences))
        self.running = [s for s in self.running if id(s) not in leaving]
        self._plan = None
        self._rows.keep(order)
