"""Search for the settings that answer the most requests/s within a limit, and measure the best ones again.

This is a coordinate search: it tries all values of one setting after the other, with the others at their best so far,
until a pass over all settings finds nothing better. The best few are then measured again, so that chance does not
decide.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from deploykit.hardware import available_cpus, threads_of_each
from deploykit.runtime.serving_settings import ServingSettings
from deploykit.tasks.protocol import TaskFacts
from deploykit.tasks.registry import task_of
from deploykit.tune.limits import Slo

NOISE = 0.05
"""Rates that differ by less count as equal; the search for a rate ends within 5%."""
_FINALISTS = 3
_FINAL_ROUNDS = 2
_BATCHES = (0, 8, 16, 32)
_DELAYS_US = (0, 500, 2000, 5000)
_ROWS = (16, 32, 64, 128)

Graph = tuple[str, str]
"""Engine and precision."""


TUNED_SETTINGS = ("preferred_batch_size", "max_queue_delay_us", "max_rows")
"""The settings of ``Task.settings`` that a search tries."""


@dataclass(frozen=True)
class Configuration:
    """A candidate: engine, precision and serving settings."""

    engine: str
    precision: str
    settings: ServingSettings

    def describe(self, task: TaskFacts) -> str:
        s = self.settings
        threads = s.threads or threads_of_each(s.instances or 1)
        instances = f"{s.instances} instance{'s' * (s.instances != 1)} × {threads} thread{'s' * (threads != 1)}"
        if "preferred_batch_size" not in task_of(task).settings:
            return f"{self.engine} {self.precision}, {instances}, {s.max_rows} rows a step"
        batch = (
            f"batches of {s.preferred_batch_size}" if s.preferred_batch_size else f"batches up to {s.max_batch_size}"
        )
        return f"{self.engine} {self.precision}, {instances}, {batch}, delay {s.max_queue_delay_us / 1e3:g} ms"


@dataclass(frozen=True)
class Round:
    """One measurement of a configuration.

    ``rate_per_s`` is the highest rate within the limit, None if there is none. ``latency_ms`` (p50, p90, p99) is at
    that rate, else with one caller; empty after a ``failure``. ``memory_mb`` (1e6 bytes) is that of all server
    processes after the load; shared pages count once. ``cpu_ms`` is the CPU time of a request at that load, by
    process and stage (``Measurement``).
    """

    rate_per_s: float | None
    latency_ms: Mapping[str, float]
    memory_mb: float | None
    seconds: float
    failure: str | None = None
    cpu_ms: Mapping[str, float] | None = None


@dataclass(frozen=True)
class Trial:
    """A configuration with all its measurements."""

    choice: Configuration
    rounds: tuple[Round, ...]

    @property
    def rate_per_s(self) -> float:
        """The median of the rounds; 0 if one of them found no rate within the limit."""
        rates = [r.rate_per_s or 0.0 for r in self.rounds]
        return statistics.median(rates) if min(rates) else 0.0

    @property
    def memory_mb(self) -> float | None:
        return max((r.memory_mb for r in self.rounds if r.memory_mb is not None), default=None)

    def latency_ms(self, figure: str) -> float | None:
        values = [r.latency_ms[figure] for r in self.rounds if figure in r.latency_ms]
        return statistics.median(values) if values else None

    @property
    def cpu_ms(self) -> Mapping[str, float] | None:
        """The value of the last round that has it."""
        return next((r.cpu_ms for r in reversed(self.rounds) if r.cpu_ms is not None), None)

    @property
    def failure(self) -> str | None:
        return next((r.failure for r in self.rounds if r.failure is not None), None)


@dataclass(frozen=True)
class Limits:
    """Limits of the search.

    ``max_memory_mb`` None means no limit. ``budget_s`` limits the sum of the rounds' seconds: a round starts only if it
    fits even when it takes as long as the longest before it. The present configuration is always measured once.
    """

    slo: Slo
    max_memory_mb: float | None
    budget_s: float

    def fits(self, trial: Trial) -> bool:
        """Return whether the trial is within the memory limit, as far as known."""
        return self.max_memory_mb is None or trial.memory_mb is None or trial.memory_mb <= self.max_memory_mb

    def holds(self, trial: Trial) -> bool:
        """Return whether the trial is within both limits."""
        return trial.rate_per_s > 0 and self.fits(trial)


Measure = Callable[[Configuration, int, float | None], Round]
"""Measures a configuration for the n-th time, from 0, starting at an expected rate (None: unknown)."""


def search(
    task: TaskFacts,
    present: Configuration,
    graphs: Sequence[Graph],
    limits: Limits,
    measure: Measure,
    say: Callable[[str], None],
) -> list[Trial]:
    """Return all trials, in the order they were made; the first is ``present``. The same figures give the same
    search."""
    tried: dict[Configuration, Trial] = {}
    seconds: list[float] = []

    def run(choice: Configuration, expected: float | None) -> Trial:
        key = _resolved(choice)
        before = tried[key].rounds if key in tried else ()
        new = measure(choice, len(before), expected)
        seconds.append(new.seconds)
        tried[key] = Trial(choice, (*before, new))
        summary = f"{choice.describe(task)}: {_summary(new, limits.slo)}"
        say(f"{sum(seconds):.0f} of {limits.budget_s:.0f} s, {len(tried)}: {summary}")
        return tried[key]

    def time_for(rounds: int) -> bool:
        """Return whether the next round fits if it is as slow as the slowest, and later ones as slow as most."""
        return sum(seconds) + max(seconds) + (rounds - 1) * statistics.mean(seconds) <= limits.budget_s

    best = run(present, None)
    improved, left_out = True, False
    while improved:
        improved = False
        for axis in range(len(_axes(task, best.choice, graphs, limits.slo))):
            for choice in _axes(task, best.choice, graphs, limits.slo)[axis]:
                if _resolved(choice) in tried:
                    continue
                if not time_for(1 + min(_FINALISTS, len(tried) + 1)):
                    left_out = True
                    continue
                trial = run(choice, best.rate_per_s or None)
                if _rank(trial, limits) > _rank(best, limits):
                    best, improved = trial, True
    finalists = [t.choice for t in sorted(tried.values(), key=lambda t: _rank(t, limits), reverse=True)[:_FINALISTS]]
    if present not in finalists:
        finalists[-1:] = [present]
    for _ in range(_FINAL_ROUNDS):
        for choice in finalists:
            trial = tried[_resolved(choice)]
            if len(finalists) > 1 and limits.holds(trial) and time_for(1):
                run(choice, trial.rate_per_s)
    if left_out:
        say(f"the time is up after {len(tried)} settings; more --time tries others")
    return list(tried.values())


def choose(trials: Sequence[Trial], limits: Limits) -> Trial | None:
    """Return the best trial among those within the limits that have about the highest rate.

    Prefers the first trial, the present configuration, else the one with the least memory. None if no trial is within
    the limits.
    """
    holding = [trial for trial in trials if limits.holds(trial)]
    most = max((trial.rate_per_s for trial in holding), default=0.0)
    near = [trial for trial in holding if trial.rate_per_s >= most * (1 - NOISE)]
    if trials[0] in near:
        return trials[0]
    return min(near, key=lambda trial: (trial.memory_mb or 0.0, -trial.rate_per_s), default=None)


def verdict(trial: Trial, chosen: Trial | None, limits: Limits) -> str:
    """Return the reason why a trial was chosen or not."""
    if trial is chosen:
        return "chosen"
    if trial.failure is not None:
        return f"does not run: {trial.failure}"
    if not trial.rate_per_s:
        waits = trial.latency_ms(limits.slo.figure)
        return f"no rate is within the limit: {limits.slo.figure} is {waits:.1f} ms" if waits else "all requests fail"
    if not limits.fits(trial):
        return f"takes {trial.memory_mb:,.0f} MB, more than {limits.max_memory_mb:,.0f}"
    assert chosen is not None
    behind = 1 - trial.rate_per_s / chosen.rate_per_s
    if behind > NOISE:
        return f"answers {behind:.0%} fewer"
    more = (trial.memory_mb or 0.0) - (chosen.memory_mb or 0.0)
    return f"as fast within {NOISE:.0%}, " + (f"and takes {more:,.0f} MB more" if more >= 1 else "and no better")


def _axes(task: TaskFacts, best: Configuration, graphs: Sequence[Graph], slo: Slo) -> list[list[Configuration]]:
    """Return the configurations to try for each setting, the others as in ``best``."""

    def those(setting: str, values: Sequence[Any]) -> list[Configuration]:
        return [replace(best, settings=replace(best.settings, **{setting: value})) for value in values]

    cpus = available_cpus()
    counts = [2**i for i in range((2 * cpus).bit_length())]
    axes = [
        [replace(best, engine=engine, precision=precision) for engine, precision in graphs],
        those("instances", counts),
        those("threads", [0, *(n for n in counts if n <= cpus)]),
    ]
    if "preferred_batch_size" in task_of(task).settings:
        batches = [n for n in _BATCHES if n < best.settings.max_batch_size]
        delays = [us for us in _DELAYS_US if us <= 100 * slo.limit_ms]  # a tenth of the limit
        return [*axes, those("preferred_batch_size", batches), those("max_queue_delay_us", delays)]
    return [*axes, those("max_rows", _ROWS)]


def _resolved(choice: Configuration) -> Configuration:
    """Return a canonical form, equal for configurations that are served in the same way."""
    settings = choice.settings
    threads = settings.threads or threads_of_each(settings.instances or 1)
    return replace(choice, settings=replace(settings, threads=threads))


def _rank(trial: Trial, limits: Limits) -> tuple[bool, float]:
    """Return a sort key, higher is better: trials within the limits, by rate; then the others, by less memory."""
    if limits.holds(trial):
        return True, trial.rate_per_s
    return False, -(trial.memory_mb or float("inf"))


def _summary(measured: Round, slo: Slo) -> str:
    if measured.failure is not None:
        return f"does not run: {measured.failure}"
    latency = ", ".join(f"{key} {measured.latency_ms[key]:.1f} ms" for key in ("p50", "p99") if measured.latency_ms)
    memory = f"{measured.memory_mb:,.0f} MB" if measured.memory_mb else "memory not known"
    if measured.rate_per_s is None:
        return f"no rate has {slo} (with one caller {latency}), {memory}"
    return f"{measured.rate_per_s:.1f}/s with {slo} ({latency}), {memory}"
