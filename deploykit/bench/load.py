"""Generate load on a model, and measure how long each request waits for its answer."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deploykit.bench.capacity import highest_rate
from deploykit.bench.machine import server_processes
from deploykit.bench.scenarios import (
    TIMEOUT_S,
    ClosedLoop,
    LoadResult,
    Poisson,
    Scenario,
    Server,
    Within,
)
from deploykit.bench.server_cpu import ServerCpu
from deploykit.errors import UsageError, first_line
from deploykit.peak_memory import PeakMemory
from deploykit.runtime.generation import Generation
from deploykit.tasks.protocol import Answer, Predictor
from deploykit.tasks.registry import task_of

FEW_SAMPLES = 100
"""With fewer latencies than this, the 99th percentile is about their maximum."""

_MAX_BATCH = 64
_FAILURE_PAUSE_S = 0.05  # pause after a failure: a target that fails at once would otherwise get thousands of requests


def answer_texts(predictor: Predictor, texts: Sequence[str], generation: Any = None) -> list[Answer]:
    """Answer all ``texts`` in one call, in order. ``generation`` replaces the search parameters of a generating
    model."""
    return task_of(predictor.task).answer(predictor, texts, generation)


@dataclass(frozen=True)
class Measurement:
    """One run of one scenario against one target.

    - ``duration_s``: from the first request to the last answer.
    - ``throughput_per_s``: counts successful requests only.
    - ``latency_ms``: p50, p90, p99, mean and max of successful requests; empty if there are none.
    - ``peak_memory_mb`` (1e6 bytes): highest resident memory: of this process for a target inside it, of tritonserver
      and its
      stubs together for a local server, None for a remote one.
    - ``generator_cpu_ms``: CPU time of this process per request: what the load generator took away from a local server.
    - ``cpu_ms``: CPU time per request of the ``client`` and of a local server, by process and stage (``ServerCpu``); None for
      other targets.
    - ``send_lag_ms``: p99 of how late requests were sent (open loop against a server).
    - ``answers``: the last answer to each row of the texts.
    - ``tokens``: number of generated tokens (translators). ``seconds``: time by stage, of a translator in this process.
    """

    scenario: Scenario
    duration_s: float
    requests: int
    errors: int
    error_examples: Mapping[str, int]
    latencies_ms: NDArray[np.float64]
    peak_memory_mb: float | None
    answers: Mapping[int, str]
    generator_cpu_ms: float
    send_lag_ms: float | None = None
    tokens: int = 0
    seconds: Mapping[str, float] | None = None
    cpu_ms: Mapping[str, float] | None = None

    @property
    def throughput_per_s(self) -> float:
        return (self.requests - self.errors) / self.duration_s

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.duration_s

    @property
    def latency_ms(self) -> dict[str, float]:
        return latency_summary(self.latencies_ms)

    @property
    def few_samples(self) -> bool:
        return len(self.latencies_ms) < FEW_SAMPLES


def latency_summary(latencies_ms: NDArray[np.float64]) -> dict[str, float]:
    """Return p50, p90, p99 (linear interpolation), mean and max, in milliseconds; empty for no latencies."""
    if not len(latencies_ms):
        return {}
    p50, p90, p99 = np.percentile(latencies_ms, (50, 90, 99))
    return {
        "p50": float(p50),
        "p90": float(p90),
        "p99": float(p99),
        "mean": float(latencies_ms.mean()),
        "max": float(latencies_ms.max()),
    }


def measure(
    target: Predictor | Server,
    texts: Sequence[str],
    scenario: Scenario,
    *,
    seconds: float,
    generation: Generation | None = None,
    warmup_s: float = 1.0,
    seed: int = 0,
    timeout_s: float = TIMEOUT_S,
) -> Measurement:
    """Put ``target`` under load for ``seconds``, after ``warmup_s`` of the same load that does not count.

    Texts are sent repeatedly in an order shuffled by ``seed``. Failures are counted, never raised; a request
    without an answer after ``timeout_s`` is a failure. ``generation`` replaces a translator's own search parameters. A
    search for a rate (``Within``) takes that time for each rate that it tries.
    """
    if not texts:
        raise UsageError("there are no texts to send", "give a file with at least one row")
    if isinstance(scenario, Within):
        return _within(
            target,
            texts,
            scenario,
            seconds=seconds,
            generation=generation,
            warmup_s=warmup_s,
            seed=seed,
            timeout_s=timeout_s,
        )
    if warmup_s > 0:
        _run_scenario(target, texts, scenario, generation, warmup_s, seed + 1, timeout_s)
    processes = server_processes(target.url) if isinstance(target, Server) else None
    before = _stages(target)
    cpu = ServerCpu(processes or (), target.model if isinstance(target, Server) else "")
    with PeakMemory(processes) as memory, cpu:
        answers = _run_scenario(target, texts, scenario, generation, seconds, seed, timeout_s)
    errors = sum(answers.errors.values())
    requests = len(answers.latencies_ms) + errors
    generator_ms = 1e3 * answers.cpu_s / max(1, requests)
    server_ms = cpu.per_request_ms(requests)
    lag = answers.send_lag_ms if isinstance(scenario, Poisson) else None
    return Measurement(
        scenario=scenario,
        duration_s=answers.duration_s,
        requests=requests,
        errors=errors,
        error_examples=answers.errors,
        latencies_ms=answers.latencies_ms,
        peak_memory_mb=memory.peak_mb,
        answers=answers.texts,
        generator_cpu_ms=generator_ms,
        send_lag_ms=float(np.percentile(lag, 99)) if lag is not None and len(lag) else None,
        tokens=answers.tokens,
        seconds={stage: after - before[stage] for stage, after in _stages(target).items()} or None,
        cpu_ms={"client": generator_ms, **server_ms} if server_ms else None,
    )


def _within(target: Predictor | Server, texts: Sequence[str], scenario: Within, **how: Any) -> Measurement:
    """Measure at the rate found; if no rate holds the limit, return a measurement without requests."""
    alone = measure(target, texts, ClosedLoop(1), **how)

    def probe(rate_per_s: float) -> Measurement:
        return measure(target, texts, Poisson(rate_per_s), **how)

    found = highest_rate(probe, scenario.limit_ms, 0.5 * alone.throughput_per_s)
    if found is None:
        return replace(alone, scenario=scenario, requests=0, errors=0, latencies_ms=np.empty(0), answers={}, tokens=0)
    return replace(found, scenario=scenario)


def _stages(target: Predictor | Server) -> dict[str, float]:
    """Return the seconds by stage that a translator in this process has counted so far; empty for other targets."""
    decoder = getattr(target, "decoder", None)
    if decoder is None:
        return {}
    from deploykit.runtime.decoding import Decoder

    if isinstance(decoder, Decoder):
        return asdict(decoder.seconds)
    return {}


def _run_scenario(
    target: Predictor | Server,
    texts: Sequence[str],
    scenario: ClosedLoop | Poisson,
    generation: Generation | None,
    seconds: float,
    seed: int,
    timeout_s: float,
) -> LoadResult:
    rows = itertools.cycle(np.random.default_rng(seed).permutation(len(texts)).tolist())
    load = scenario.concurrency if isinstance(scenario, ClosedLoop) else scenario.arrivals(seconds, seed)
    if isinstance(target, Server):
        from deploykit.bench.http import ask_server

        return ask_server(target, texts, rows, load, generation=generation, seconds=seconds, timeout_s=timeout_s)
    recorder = _Recorder(target, texts, generation)
    if isinstance(load, int):
        return _closed_loop(recorder, rows, load, seconds)
    return _open_loop(recorder, rows, load, seconds + timeout_s)


class _Recorder:
    """Collects latencies, answers and errors of a predictor in this process."""

    def __init__(self, predictor: Predictor, texts: Sequence[str], generation: Generation | None) -> None:
        self._predictor = predictor
        self._texts = texts
        self._generation = generation
        self._latencies: list[NDArray[np.float64]] = []
        self._answered: dict[int, str] = {}
        self._tokens = 0
        self.errors: Counter[str] = Counter()
        self._cpu_start = time.process_time()
        self._start = time.perf_counter()

    def now(self) -> float:
        return time.perf_counter() - self._start

    def ask(self, rows: Sequence[int], due: NDArray[np.float64]) -> None:
        """Answer ``rows`` in one call. ``due`` is when each was requested, in seconds from the start."""
        try:
            answers = answer_texts(self._predictor, [self._texts[row] for row in rows], self._generation)
            self._latencies.append((self.now() - due) * 1e3)
            for row, answer in zip(rows, answers):
                self._answered[row] = answer.text
                self._tokens += answer.tokens
        except Exception as error:  # an error under load is a result
            self.errors[first_line(error)] += len(rows)
            time.sleep(_FAILURE_PAUSE_S)

    def answers(self) -> LoadResult:
        latencies = np.concatenate(self._latencies) if self._latencies else np.empty(0)
        cpu_s = time.process_time() - self._cpu_start
        return LoadResult(self.now(), cpu_s, latencies, self._answered, self._tokens, self.errors)


def _closed_loop(recorder: _Recorder, rows: Iterator[int], concurrency: int, seconds: float) -> LoadResult:
    """Merge the callers' texts into one call; each caller waits for the whole call."""
    while (now := recorder.now()) < seconds:
        recorder.ask(list(itertools.islice(rows, concurrency)), np.full(concurrency, now))
    return recorder.answers()


def _open_loop(recorder: _Recorder, rows: Iterator[int], arrivals: NDArray[np.float64], give_up_s: float) -> LoadResult:
    """Run one worker that answers all waiting texts, up to 64, in one call."""
    first = 0
    while first < len(arrivals) and (now := recorder.now()) < give_up_s:
        if arrivals[first] > now:
            time.sleep(arrivals[first] - now)
        arrived = int(np.searchsorted(arrivals, recorder.now(), side="right"))
        last = min(max(arrived, first + 1), first + _MAX_BATCH)
        recorder.ask(list(itertools.islice(rows, last - first)), arrivals[first:last])
        first = last
    if first < len(arrivals):
        recorder.errors["not answered in time: more requests arrive than can be answered"] += len(arrivals) - first
    return recorder.answers()
