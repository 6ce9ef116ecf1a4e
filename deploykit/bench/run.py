"""Measure candidates side by side: speed under several loads, memory, and accuracy."""

from __future__ import annotations

import datetime
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deploykit.bench.load import FEW_SAMPLES, Measurement, measure
from deploykit.bench.machine import OtherLoad, describe_machine, other_load, settle
from deploykit.bench.scenarios import ClosedLoop, Scenario, Server
from deploykit.bootstrap import differences, intervals
from deploykit.errors import DataError, UsageError
from deploykit.peak_memory import require_psutil
from deploykit.report.record import SCHEMA
from deploykit.runtime.generation import Generation
from deploykit.tasks.protocol import Grade, Predictor
from deploykit.tasks.registry import task_of

DEFAULT_SCENARIOS: tuple[Scenario, ...] = (ClosedLoop(1), ClosedLoop(8), ClosedLoop(64))
_HISTOGRAM_BINS = 100
BUSY_PERCENT = 10.0
_ERROR_EXAMPLES = 5


@dataclass(frozen=True)
class Candidate:
    """A model to measure, with the name that the report shows.

    - ``size_mb`` (1e6 bytes): size of the graph files.
    - ``generation``: replaces a translator's own search parameters.
    - ``peak_memory_mb`` and ``first_answer_s`` (from the start of Python): measured before, in a separate process.
    - ``texts``: replace the benchmark's texts, for candidates that differ only in their texts; not graded.
    """

    name: str
    target: Predictor | Server
    size_mb: float | None = None
    precision: str | None = None
    engine: str | None = None
    peak_memory_mb: float | None = None
    first_answer_s: float | None = None
    generation: Generation | None = None
    texts: Sequence[str] | None = None


@dataclass(frozen=True)
class ScenarioResult:
    """The rounds of one scenario against one candidate."""

    scenario: Scenario
    rounds: tuple[Measurement, ...]

    @property
    def throughput_per_s(self) -> float:
        return statistics.median(m.throughput_per_s for m in self.rounds)

    @property
    def errors(self) -> int:
        return sum(m.errors for m in self.rounds)

    def to_json(self) -> dict[str, Any]:
        errors: Counter[str] = Counter()
        for measurement in self.rounds:
            errors.update(measurement.error_examples)
        summaries = [m.latency_ms for m in self.rounds if m.latency_ms]
        stages: Counter[str] = Counter()
        for measurement in self.rounds:
            stages.update(measurement.seconds or {})
        return {
            "scenario": self.scenario.to_json(),
            "throughput_per_s": spread([m.throughput_per_s for m in self.rounds]),
            "tokens_per_s": spread([m.tokens_per_s for m in self.rounds])
            if any(m.tokens for m in self.rounds)
            else None,
            "latency_ms": {
                key: spread([s[key] for s in summaries]) if summaries else None
                for key in ("p50", "p90", "p99", "mean", "max")
            },
            "few_samples": any(m.few_samples for m in self.rounds),
            "histogram": _histogram(np.concatenate([m.latencies_ms for m in self.rounds])),
            "requests": sum(m.requests for m in self.rounds),
            "errors": self.errors,
            "error_examples": dict(errors.most_common(_ERROR_EXAMPLES)),
            "duration_s": spread([m.duration_s for m in self.rounds]),
            "achieved_rate_per_s": spread([m.requests / m.duration_s for m in self.rounds]),
            "peak_memory_mb": max((m.peak_memory_mb for m in self.rounds if m.peak_memory_mb), default=None),
            "generator_cpu_ms": spread([m.generator_cpu_ms for m in self.rounds]),
            "cpu_ms": self._cpu_ms(),
            "send_lag_ms": max((m.send_lag_ms for m in self.rounds if m.send_lag_ms is not None), default=None),
            "seconds": dict(stages) or None,
        }

    def _cpu_ms(self) -> dict[str, dict[str, float]] | None:
        rounds = [m.cpu_ms for m in self.rounds if m.cpu_ms]
        names = [name for name in rounds[0] if all(name in one for one in rounds)] if rounds else []
        return {name: spread([one[name] for one in rounds]) for name in names} or None


@dataclass(frozen=True)
class CandidateResult:
    """All results of a candidate.

    ``metrics`` are over all rows, None without truth; ``differences`` from the first candidate (``deploykit.bootstrap``) are None
    for itself, and where the task does not weigh rows. ``disagreements`` counts texts with another answer under load
    than when ``metrics`` was measured (None without truth); it should be 0. ``labels`` are those of a graded
    classifier.
    """

    candidate: Candidate
    scenarios: tuple[ScenarioResult, ...]
    labels: tuple[str, ...] | None
    metrics: Mapping[str, Any] | None
    differences: Mapping[str, Any] | None
    disagreements: int | None

    @property
    def headline(self) -> ScenarioResult:
        """The closed loop with the highest throughput; without closed loops, the scenario with the highest."""
        closed = [s for s in self.scenarios if isinstance(s.scenario, ClosedLoop)]
        return max(closed or self.scenarios, key=lambda s: s.throughput_per_s)

    @property
    def peak_memory_mb(self) -> float | None:
        if self.candidate.peak_memory_mb is not None:
            return self.candidate.peak_memory_mb
        seen = [m.peak_memory_mb for s in self.scenarios for m in s.rounds if m.peak_memory_mb is not None]
        return max(seen, default=None)

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.candidate.name,
            "task": self.candidate.target.task.name,
            "engine": self.candidate.engine,
            "precision": self.candidate.precision,
            "size_mb": self.candidate.size_mb,
            "served": isinstance(self.candidate.target, Server),
            "peak_memory_mb": self.peak_memory_mb,
            "first_answer_s": self.candidate.first_answer_s,
            "labels": list(self.labels) if self.labels is not None else None,
            "metrics": dict(self.metrics) if self.metrics is not None else None,
            "differences": self.differences,
            "disagreements": self.disagreements,
            "headline": self.headline.scenario.name,
            "scenarios": [s.to_json() for s in self.scenarios],
        }


@dataclass(frozen=True)
class BenchResult:
    """The complete result. Reports are drawn from ``to_json``."""

    candidates: tuple[CandidateResult, ...]
    machine: Mapping[str, Any]
    other_load: tuple[OtherLoad, ...]
    warnings: tuple[str, ...]
    rows: int
    mean_chars: float
    rounds: int
    seconds: float
    warmup_s: float
    seed: int
    started: str

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON, without NaN. Memory and sizes are in 1e6 bytes, times in the unit at the end of the key.

        The top level has the first candidate's figures in its headline scenario (the closed loop with the highest
        throughput), as medians over the rounds: throughput_per_s, tokens_per_s (target tokens; null for a classifier),
        latency_ms (p50, p90, p99), requests and errors (sums), peak_memory_mb, and metrics (null without labels or
        references). Then follow candidates (each with all its scenarios; median, min and max over the rounds), machine,
        other_load (before each round), warnings, texts, settings, started, schema. A scenario's seconds (null unless a
        translator in this process counts them) are sums over the rounds: tokenizing, encoder, decoder, search,
        detokenizing.
        """
        first = self.candidates[0]
        record = first.to_json()
        headline = first.headline.to_json()
        return {
            "schema": SCHEMA,
            "started": self.started,
            "headline": headline["scenario"],
            "throughput_per_s": headline["throughput_per_s"]["median"],
            "tokens_per_s": headline["tokens_per_s"] and headline["tokens_per_s"]["median"],
            "latency_ms": {
                key: headline["latency_ms"][key] and headline["latency_ms"][key]["median"]
                for key in ("p50", "p90", "p99")
            },
            "requests": headline["requests"],
            "errors": headline["errors"],
            "peak_memory_mb": record["peak_memory_mb"],
            "metrics": record["metrics"],
            "candidates": [candidate.to_json() for candidate in self.candidates],
            "texts": {"rows": self.rows, "mean_chars": self.mean_chars},
            "settings": {
                "rounds": self.rounds,
                "seconds": self.seconds,
                "warmup_s": self.warmup_s,
                "seed": self.seed,
            },
            "machine": dict(self.machine),
            "other_load": [load.to_json() for load in self.other_load],
            "warnings": list(self.warnings),
        }


def run_bench(
    candidates: Sequence[Candidate],
    texts: Sequence[str],
    truth: Sequence[str] | None = None,
    scenarios: Sequence[Scenario] = DEFAULT_SCENARIOS,
    *,
    rounds: int = 3,
    seconds: float = 5.0,
    warmup_s: float = 1.0,
    seed: int = 0,
    progress: Callable[[str], None] = lambda message: None,
) -> BenchResult:
    """Measure every candidate under every scenario, in ``rounds`` of ``seconds`` each.

    Within a round the candidates take turns, scenario by scenario, so that a drift of the machine affects all alike.
    With ``truth`` (a text's labels, or its translation), each candidate also answers every text once and is graded.
    """
    if not candidates or not scenarios:
        raise UsageError("no model or no scenario to measure", "give at least one of each")
    if rounds < 1 or seconds <= 0:
        raise UsageError(f"--rounds is {rounds} and --seconds {seconds:g}", "give at least 1 round, and a time above 0")
    if not texts:
        raise DataError("there are no texts to send", "give a file with at least one row")
    if truth is not None and len(truth) != len(texts):
        raise UsageError(f"{len(texts)} texts, but {len(truth)} correct answers", "give one for each text")
    if truth is not None and any(candidate.texts is not None for candidate in candidates):
        raise UsageError("a candidate's own texts have no correct answers", "leave out the texts or the answers")
    verbs = sorted({task_of(candidate.target.task).verb for candidate in candidates})
    if len(verbs) > 1:
        raise UsageError(f"some models {' and some '.join(verbs)}", "measure them separately")
    require_psutil()
    started = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    grades = [_grade(candidate, texts, truth, progress) if truth is not None else None for candidate in candidates]
    measured: dict[tuple[int, int], list[Measurement]] = {}
    loads = []
    for number in range(rounds):
        settle()
        loads.append(other_load())
        for s, scenario in enumerate(scenarios):
            for c, candidate in enumerate(candidates):
                measurement = measure(
                    candidate.target,
                    candidate.texts or texts,
                    scenario,
                    seconds=seconds,
                    generation=candidate.generation,
                    warmup_s=warmup_s,
                    seed=seed + number,
                )
                measured.setdefault((c, s), []).append(measurement)
                progress(f"round {number + 1} of {rounds}: {candidate.name}, {_summary_line(measurement)}")
    results = tuple(
        _result(
            candidate,
            [ScenarioResult(x, tuple(measured[c, s])) for s, x in enumerate(scenarios)],
            grades[c],
            grades[0] if c else None,
        )
        for c, candidate in enumerate(candidates)
    )
    if sum(not isinstance(candidate.target, Server) for candidate in candidates) > 1:
        results = tuple(_without_shared_memory(result) for result in results)
    warnings = tuple(_warnings(results, loads))
    for warning in warnings:
        progress(f"warning: {warning}")
    return BenchResult(
        candidates=results,
        machine=describe_machine(),
        other_load=tuple(loads),
        warnings=warnings,
        rows=len(texts),
        mean_chars=round(statistics.mean(map(len, texts)), 1),
        rounds=rounds,
        seconds=seconds,
        warmup_s=warmup_s,
        seed=seed,
        started=started,
    )


def _grade(candidate: Candidate, texts: Sequence[str], truth: Sequence[str], progress: Callable[[str], None]) -> Grade:
    progress(f"grading {candidate.name} on {len(texts):,} rows")
    if not isinstance(candidate.target, Server):
        return task_of(candidate.target.task).grade(candidate.target, texts, truth, candidate.generation)
    from deploykit.tasks.opening import open_served

    served = open_served(candidate.target.model, candidate.target.url)
    try:
        return task_of(served.task).grade(served, texts, truth, candidate.generation)
    finally:
        served.close()


def _result(
    candidate: Candidate, scenarios: Sequence[ScenarioResult], grade: Grade | None, first: Grade | None
) -> CandidateResult:
    if grade is None:
        return CandidateResult(candidate, tuple(scenarios), None, None, None, None)
    metrics, compared, rows = dict(grade.metrics), None, len(grade.answers)
    if grade.measure is not None:
        metrics["intervals"] = {**intervals(grade.measure, rows), **metrics.get("intervals", {})}
        if first is not None and first.measure is not None:
            compared = differences(grade.measure, first.measure, rows)
    differing = {
        row
        for s in scenarios
        for measurement in s.rounds
        for row, answer in measurement.answers.items()
        if answer != grade.answers[row]
    }
    return CandidateResult(candidate, tuple(scenarios), grade.labels, metrics, compared, len(differing))


def _without_shared_memory(result: CandidateResult) -> CandidateResult:
    """Drop memory figures of this process from times with several loaded candidates."""
    if isinstance(result.candidate.target, Server):
        return result
    scenarios = tuple(
        replace(s, rounds=tuple(replace(m, peak_memory_mb=None) for m in s.rounds)) for s in result.scenarios
    )
    return replace(result, scenarios=scenarios)


def _warnings(results: Sequence[CandidateResult], loads: Sequence[OtherLoad]) -> Iterator[str]:
    busiest = max(load.cpu_percent for load in loads)
    if busiest > BUSY_PERCENT:
        yield f"other programs used up to {busiest:.0f}% of the CPUs just before a round: the figures may be too low"
    for result in results:
        errors = sum(s.errors for s in result.scenarios)
        if errors:
            yield f"{result.candidate.name}: {errors:,} requests failed"
        if result.disagreements:
            yield f"{result.candidate.name}: {result.disagreements:,} texts were answered differently under load"
    few = {s.scenario.name: None for r in results for s in r.scenarios if any(m.few_samples for m in s.rounds)}
    if few:
        yield (
            f"some rounds have fewer than {FEW_SAMPLES} answers ({', '.join(few)}): "
            "their p99 is hardly more than the slowest answer; measure for more seconds"
        )


def _summary_line(m: Measurement) -> str:
    latency = m.latency_ms
    line = f"{m.scenario.name}: {m.throughput_per_s:.1f}/s"
    line += f", {m.tokens_per_s:.0f} tokens/s" if m.tokens else ""
    if latency:
        line += f", p50 {latency['p50']:.1f} ms, p99 {latency['p99']:.1f} ms"
    return line + (f", {m.errors} errors" if m.errors else "")


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return median, least and most of the rounds' ``values``."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def _histogram(latencies_ms: NDArray[np.float64]) -> dict[str, list[float]] | None:
    """Return counts in 100 bins of equal width on a logarithmic scale; edges_ms has one more entry than counts."""
    if not len(latencies_ms):
        return None
    least = max(float(latencies_ms.min()), 1e-3)
    most = max(float(latencies_ms.max()), least * 1.01)
    edges = np.geomspace(least, most, _HISTOGRAM_BINS + 1)
    # Rounding must not move the extremes out of their bins.
    counts, _ = np.histogram(np.clip(latencies_ms, edges[0], edges[-1]), edges)
    return {"edges_ms": edges.tolist(), "counts": counts.tolist()}
