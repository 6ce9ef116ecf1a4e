"""Compare two bench records, and find changes beyond the noise.

A figure that was measured in rounds (throughput, p50, p99) differs when the rounds' ranges (min to max) do not overlap
and the medians are more than 5% apart. For two equal systems, the ranges of 3 rounds each are disjoint by chance once
in 10 times, those of 5 rounds once in 126 (2 / C(2n, n)). That spread does not contain a drift between two runs, which
affects all rounds of one run alike: repeat measurements that matter. With fewer than 3 rounds in either record, the verdict
is "too few rounds".

For a search of the highest rate within a p99 limit, only throughput is compared. Memory and accuracy have one value per
record: they differ when they are more than 5%, or 0.5 points, apart. An accuracy must also differ by more than its 95 %
intervals over rows allow, taken as independent, as far as the records have them. That is strict, because the same rows vary
alike: ``evaluate --baseline``, which has the rows, finds smaller differences.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import zip_longest
from math import hypot
from typing import Any

from deploykit.errors import ArtifactError
from deploykit.metric_titles import points_of, shown_metrics, title_of
from deploykit.report.record import Record, results_of
from deploykit.report.svg import fraction, number
from deploykit.tasks.registry import get_task

LEAST_CHANGE = 0.05
"""Smallest relative difference of medians, and of memory, that counts."""
LEAST_POINTS = 0.5
"""Smallest difference of macro-F1 and chrF that counts, in percent."""
LEAST_ROUNDS = 3
NO_DIFFERENCE = "no difference"
TOO_FEW = "too few rounds"
WITHIN_NOISE = "within noise"

_MACHINE = {
    "cpu": "CPU",
    "cpus_usable": "usable CPUs",
    "cpus": "CPUs",
    "cpu_flags": "CPU features",
    "native_isa": "instruction set of native",
    "memory_gb": "memory, GB",
    "system": "system",
    "python": "Python",
}


@dataclass(frozen=True)
class Spread:
    """Median, min and max over the rounds; of an accuracy the value and its interval; all equal for a figure with one value."""

    median: float
    min: float
    max: float

    def to_text(self, unit: str) -> str:
        """Return it as text. ``unit`` is "" for an accuracy, whose small differences matter."""
        shown = number if unit else fraction
        return shown(self.median) + (f" ({shown(self.min)} to {shown(self.max)})" if self.max > self.min else "")


@dataclass(frozen=True)
class Change:
    """A figure of a candidate in both records, under a scenario (None for memory and accuracy, which cover the whole
    run).

    ``part`` is the suite's workload, "" for ``deploykit bench``. ``ratio`` is new median / old median, None if the old
    one is 0. ``verdict`` is "faster" or "slower" for throughput and latency, "less" or "more" for memory, "higher" or
    "lower" for accuracy, or "no difference", or "too few rounds" with fewer than 3, or "within noise" for an accuracy.
    """

    part: str
    candidate: str
    scenario: str | None
    figure: str
    unit: str
    old: Spread
    new: Spread
    ratio: float | None
    verdict: str


@dataclass(frozen=True)
class Comparison:
    """The result: ``changes``, and ``differences`` between the runs that may be their cause."""

    differences: tuple[str, ...]
    changes: tuple[Change, ...]

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON: ``differences`` (sentences), ``changes``."""
        return {"differences": list(self.differences), "changes": [asdict(change) for change in self.changes]}

    def to_text(self) -> str:
        """Return a line for each figure, by workload and candidate, after the differences."""
        lines = [*(f"note: {difference}" for difference in self.differences), *([""] if self.differences else [])]
        heading = None
        width = max(len(change.scenario or "") for change in self.changes)
        for change in self.changes:
            if heading != (heading := (change.part, change.candidate)):
                lines.append(": ".join(filter(None, heading)))
            values = f"{change.old.to_text(change.unit)} -> {change.new.to_text(change.unit)} {change.unit}".rstrip()
            ratio = "" if change.ratio is None else f"{change.ratio:.2f}x"
            lines.append(
                f"  {change.scenario or '':<{width}}  {change.figure:<10} {change.verdict:<14} {ratio:>7}  {values}"
            )
        return "\n".join(lines)


def compare(old: Record, new: Record) -> Comparison:
    """Compare ``new`` with ``old``, both from ``read_record``. Raises ArtifactError if they have nothing in common."""
    changes = tuple(_changes(results_of(old), results_of(new)))
    if not changes:
        old_ones, new_ones = (
            "; ".join(", ".join(filter(None, n)) for n in _names(r) if len(n) == 2) for r in (old, new)
        )
        raise ArtifactError(
            f"no candidate was measured under the same scenario in both records: the old one has {old_ones}, the new {new_ones}",
            "compare two records of the same bench",
        )
    return Comparison(tuple(_differences(old, new)), changes)


def _changes(old: Mapping[str, Record], new: Mapping[str, Record]) -> Iterator[Change]:
    for part in [part for part in old if part in new]:
        theirs = {candidate["name"]: candidate for candidate in new[part]["candidates"]}
        rounds = min(results[part]["settings"]["rounds"] for results in (old, new))
        for before in old[part]["candidates"]:
            if (after := theirs.get(before["name"])) is not None:
                yield from _scenario_changes(part, before, after, rounds)
                yield from _run_changes(part, before, after)


def _scenario_changes(part: str, before: Record, after: Record, rounds: int) -> Iterator[Change]:
    scenarios = {s["scenario"]["name"]: s for s in after["scenarios"]}
    for s in before["scenarios"]:
        name = s["scenario"]["name"]
        if name not in scenarios:
            continue
        pairs = [
            ("throughput", "texts/s", 1, s["throughput_per_s"], scenarios[name]["throughput_per_s"]),
            ("tokens", "tokens/s", 1, s["tokens_per_s"], scenarios[name]["tokens_per_s"]),
        ]
        if s["scenario"]["kind"] != "p99_within":  # its latencies only reflect the limit
            pairs += [(p, "ms", -1, s["latency_ms"][p], scenarios[name]["latency_ms"][p]) for p in ("p50", "p99")]
        for figure, unit, sign, ours, theirs in pairs:
            if ours and theirs:
                a, b = Spread(**ours), Spread(**theirs)
                verdict = _beyond_noise(a, b, sign) if rounds >= LEAST_ROUNDS else TOO_FEW
                yield Change(part, before["name"], name, figure, unit, a, b, _ratio(a, b), verdict)


def _beyond_noise(old: Spread, new: Spread, sign: int) -> str:
    apart = old.max < new.min or new.max < old.min
    if not apart or abs(new.median - old.median) <= LEAST_CHANGE * old.median:
        return NO_DIFFERENCE
    return "faster" if sign * (new.median - old.median) > 0 else "slower"


def _run_changes(part: str, before: Record, after: Record) -> Iterator[Change]:
    memory = before["peak_memory_mb"], after["peak_memory_mb"]
    if all(memory):
        bound = LEAST_CHANGE * memory[0]
        yield _single(part, before["name"], ("memory", "MB"), memory, bound, ("less", "more"))
    if before["metrics"] and after["metrics"]:
        name = get_task(before["task"]).headline
        if name not in before["metrics"]:
            name = next(iter(shown_metrics(before["metrics"], name)))
        points = before["metrics"][name], after["metrics"][name]
        bound = LEAST_POINTS / abs(points_of(name))
        ends = [
            side["metrics"].get("intervals", {}).get(name, (value, value))
            for side, value in zip((before, after), points)
        ]
        yield _single(part, before["name"], (title_of(name), ""), points, bound, ("lower", "higher"), ends)


def _single(
    part: str,
    name: str,
    figure: tuple[str, str],
    values: tuple[float, float],
    bound: float,
    words: tuple[str, str],
    ends: Sequence[tuple[float, float]] = (),
) -> Change:
    """Compare a figure with one value per record. ``words`` are the verdicts for a smaller and a larger new value, ``ends``
    the intervals of the values."""
    old, new = (Spread(value, *(end or (value, value))) for value, end in zip_longest(values, ends))
    change = new.median - old.median
    facing = (
        (old.max - old.median, new.median - new.min) if change > 0 else (old.median - old.min, new.max - new.median)
    )
    verdict = NO_DIFFERENCE if abs(change) <= bound else words[change > 0]
    if verdict != NO_DIFFERENCE and abs(change) <= hypot(*facing):
        verdict = WITHIN_NOISE
    return Change(part, name, None, *figure, old, new, _ratio(old, new), verdict)


def _ratio(old: Spread, new: Spread) -> float | None:
    return new.median / old.median if old.median else None


def _differences(old: Record, new: Record) -> Iterator[str]:
    """Yield differences of the runs, other than the candidates, that may explain different figures."""
    for key, title in _MACHINE.items():
        if key in old["machine"] and key in new["machine"]:  # older records lack some
            yield from _differing(title, old["machine"][key], new["machine"][key])
    packages = [record["machine"]["packages"] for record in (old, new)]
    for name in dict.fromkeys([*packages[0], *packages[1]]):
        yield from _differing(name, *(versions.get(name) for versions in packages))
    yield from _differing("threads", old.get("threads"), new.get("threads"))
    yield from _differing("environment", old.get("environment") or None, new.get("environment") or None)
    theirs = results_of(new)
    for part, before in results_of(old).items():
        if part in theirs:
            prefix = f"{part}: " if part else ""
            for key in ("texts", "settings"):
                for name, value in before[key].items():
                    yield from _differing(f"{prefix}{name}", value, theirs[part][key].get(name))
    for whose, record, other in (("old", old, new), ("new", new, old)):
        known = _names(other)
        for name in _names(record):
            if name not in known and (len(name) == 1 or name[:-1] in known):
                yield f"only in the {whose}: {', '.join(filter(None, name))}"
        for part, result in results_of(record).items():
            for warning in result["warnings"]:
                yield f"{whose}: {f'{part}: ' if part else ''}{warning}"


def _differing(what: str, old: Any, new: Any) -> Iterator[str]:
    if old != new:
        yield f"{what}: {_text(old)} -> {_text(new)}"


def _text(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return "not told" if value is None else str(value)


def _names(record: Record) -> dict[tuple[str, ...], None]:
    """Yield the names of workloads, candidates and scenarios, each after its parent's."""
    names: dict[tuple[str, ...], None] = {}
    for part, result in results_of(record).items():
        names[part,] = None
        for candidate in result["candidates"]:
            names[part, candidate["name"]] = None
            for s in candidate["scenarios"]:
                names[part, candidate["name"], s["scenario"]["name"]] = None
    return names
