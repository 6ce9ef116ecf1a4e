"""Write bench/capacity.md from the newest record of bench/scaling.py: load per node, and number of nodes for a load."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
LOADS = (10, 100, 1_000, 10_000)
_GROWTH = {
    "length": "Texts of so many tokens, in one process",
    "threads": "CPU threads, in one process",
    "models": "Models of one server, of which one is asked",
    "hours": "Hours of load without a pause, on one server",
}

Record = Mapping[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("record", type=Path, nargs="?", help="default: the newest in bench/results")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "capacity.md")
    options = parser.parse_args()
    records = sorted((ROOT / "bench" / "results").glob("*-scaling.json"))
    if options.record is None and not records:
        sys.exit("bench/results has no record of scaling.py: run python bench/scaling.py EXPORT first")
    record = options.record or records[-1]
    options.out.write_text(render(json.loads(record.read_text(encoding="utf-8"))), encoding="utf-8")


def render(suite: Record) -> str:
    """Return Markdown. ``suite`` has at least the axis instances."""
    machine = suite["machine"]
    by_axis = {workload["key"]: workload for workload in suite["workloads"]}
    lines = [
        "# What a node carries",
        "",
        f"Measured {suite['started'][:10]} on {machine['cpu']}, {machine['cpus_usable']} cores, {machine['memory_gb']} GB, by "
        f"`{suite['command']}`. Written by `python bench/nodes.py` from that record; a node is a machine like that one.",
        "",
        *_node(by_axis["instances"]),
    ]
    if "batch" in by_axis:
        lines += ["", "## Texts of one call, in one process", "", *_batches(by_axis["batch"])]
    for axis, title in _GROWTH.items():
        if axis in by_axis:
            lines += ["", f"## {title}", "", *_growth(axis, by_axis[axis])]
    return "\n".join(lines) + "\n"


def carried(workload: Record) -> tuple[Record, Record]:
    """Return the candidate with the highest rate within the limit, and that scenario."""
    found = [
        (candidate, s)
        for candidate in workload["bench"]["candidates"]
        for s in candidate["scenarios"]
        if s["scenario"]["kind"] == "p99_within" and s["throughput_per_s"]["min"] > 0
    ]
    if not found:
        raise SystemExit("no instances held the limit of p99: measure again with a higher --p99-limit")
    return max(found, key=lambda pair: pair[1]["throughput_per_s"]["median"])


def nodes(load_per_s: float, carried_per_s: float) -> int:
    """Return the number of nodes that answer ``load_per_s`` when one of them fails."""
    return math.ceil(load_per_s / carried_per_s) + 1


def _node(workload: Record) -> Iterator[str]:
    best, s = carried(workload)
    rates, limit = s["throughput_per_s"], s["scenario"]["limit_ms"]
    texts = workload["bench"]["texts"]
    yield (
        f"One node answers **{rates['median']:.0f} requests a second** of one text, arriving at random, with p99 within {limit:g} ms "
        f"({rates['min']:.0f} to {rates['max']:.0f} in {workload['bench']['settings']['rounds']} rounds), served with {best['name']} in "
        f"{best['peak_memory_mb']:.0f} MB. The texts have {texts['mean_chars']:g} characters on average."
    )
    yield ""
    yield from _growth("instances", workload)
    yield from ("", "## Nodes for a load", "")
    yield (
        f"Each counted with its lowest round, {rates['min']:.0f} requests a second, and one more than that needs, so that one may "
        "fail. It holds if requests are spread evenly and arrive as independently as those measured."
    )
    yield ""
    yield from _head("requests a second", "nodes")
    for load in LOADS:
        yield _row([f"{load:,}", f"{nodes(load, rates['min']):,}"])


def _batches(workload: Record) -> Iterator[str]:
    """Return a table of one candidate, with a row for each number of texts in a call."""
    yield from _head("texts", "texts/s", "p50 ms", "p99 ms")
    for s in workload["bench"]["candidates"][0]["scenarios"]:
        yield _row([f"{s['scenario']['concurrency']}", *_figures(s)])


def _figures(scenario: Record) -> list[str]:
    latencies = [scenario["latency_ms"][key] for key in ("p50", "p99")]
    return [
        f"{scenario['throughput_per_s']['median']:.0f}",
        *(f"{latency['median']:.1f}" if latency else "-" for latency in latencies),
    ]


def _growth(axis: str, workload: Record) -> Iterator[str]:
    candidates = workload["bench"]["candidates"]
    scenarios = [s["scenario"]["name"] for s in candidates[0]["scenarios"]]
    titles = [f"{name}: {figure}" for name in scenarios for figure in ("texts/s", "p50 ms", "p99 ms")]
    yield from _head(axis, *titles, "memory MB")
    for candidate in candidates:
        cells = [cell for s in candidate["scenarios"] for cell in _figures(s)]
        memory = candidate["peak_memory_mb"]
        yield _row([f"{workload['values'][candidate['name']]:g}", *cells, "-" if memory is None else f"{memory:.0f}"])


def _head(*titles: str) -> list[str]:
    return [_row(titles), "|" + "---:|" * len(titles)]


def _row(cells: list[str] | tuple[str, ...]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
