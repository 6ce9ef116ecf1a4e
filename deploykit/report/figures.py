"""Draw the figures of a report from a bench result in JSON."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from deploykit.metric_titles import points_of, title_of
from deploykit.report.svg import INK, add_legend, colour_of, locator, marker_of, number, shown, to_svg
from deploykit.tasks.registry import get_task

Record = Mapping[str, Any]


def throughput_bars(result: Record) -> str | None:
    """Draw a panel for each closed loop and each searched rate, with a bar and its range for each candidate.

    Returns None with one candidate, or without answers.
    """
    candidates = result["candidates"]
    panels = [s["scenario"] for s in candidates[0]["scenarios"] if s["scenario"]["kind"] != "poisson"]
    key, unit = ("tokens_per_s", "target tokens/s") if generates(result) else ("throughput_per_s", "texts/s")
    answered = any(s[key] and s[key]["max"] for candidate in candidates for s in candidate["scenarios"])
    if len(candidates) < 2 or not panels or not answered:
        return None
    columns = 2 if len(panels) == 4 else min(3, len(panels))
    rows = -(-len(panels) // columns)

    def draw(figure: Any) -> None:
        every = figure.subplots(rows, columns, sharey=True, squeeze=False).ravel()
        for axes, scenario in zip(every, panels):
            spreads = [s[key] for c in candidates for s in c["scenarios"] if s["scenario"]["name"] == scenario["name"]]
            for i, spread in enumerate(spreads):
                if not spread:
                    continue
                middle = spread["median"]
                reach = [[middle - spread["min"]], [spread["max"] - middle]]
                axes.barh(i, middle, 0.6, color=colour_of(i))
                axes.errorbar(middle, i, xerr=reach, color=INK, linewidth=1.2, capsize=3)
                at, text = (spread["max"], i), number(middle)
                axes.annotate(text, at, (5, 0), textcoords="offset points", va="center", fontsize=9)
            axes.set_title(scenario["name"], fontsize=11)
            axes.set_xlim(0, 1.3 * max((s["max"] for s in spreads if s), default=0) or 1)  # leave room for the numbers
            axes.grid(False, axis="y")
            axes.tick_params(axis="y", length=0)
            axes.xaxis.set_major_locator(locator(3))
        for axes in every[len(panels) :]:
            axes.set_axis_off()
        every[0].set_yticks(range(len(candidates)), [shown(c["name"], 30) for c in candidates])
        every[0].invert_yaxis()
        figure.supxlabel(unit, fontsize=11)
        figure.get_layout_engine().set(hspace=0.1)

    return to_svg("bars", draw, (2.6 + 2.5 * columns, rows * (0.9 + 0.34 * len(candidates)) + 0.3))


@dataclass(frozen=True)
class Scaling:
    """Results of ``name`` over the values of one parameter: a record's scenario at each value."""

    name: str
    points: Sequence[tuple[float, Record]]


def scaling_with_callers(result: Record) -> str | None:
    """Draw scaling over the closed loops, whose callers in one process form a batch. None for fewer than three."""
    lines = [
        Scaling(
            c["name"], [(s["scenario"]["concurrency"], s) for s in c["scenarios"] if "concurrency" in s["scenario"]]
        )
        for c in result["candidates"]
    ]
    return scaling("callers", lines) if all(len(line.points) > 2 for line in lines) else None


def scaling(axis: str, lines: Sequence[Scaling]) -> str:
    """Draw throughput and p50 against ``axis`` ("threads"): medians, with the range of the rounds."""

    def draw(figure: Any) -> None:
        left, right = figure.subplots(1, 2)
        plotted: list[tuple[Any, str, Callable[[Record], Record | None]]] = [
            (left, "texts/s", lambda s: s["throughput_per_s"]),
            (right, "p50 latency, ms (log scale)", lambda s: s["latency_ms"]["p50"]),
        ]
        for axes, title, of in plotted:
            for i, line in enumerate(lines):
                points = [(x, spread) for x, s in line.points if (spread := of(s))]
                middle = [spread["median"] for _, spread in points]
                reach = [
                    [spread["median"] - spread["min"] for _, spread in points],
                    [spread["max"] - spread["median"] for _, spread in points],
                ]
                style = {"color": colour_of(i), "marker": marker_of(i), "linewidth": 1.8, "capsize": 3}
                label = shown(line.name) if axes is left else None
                axes.errorbar([x for x, _ in points], middle, yerr=reach, label=label, **style)
            axes.set_xscale("log", base=2)
            values = sorted({x for line in lines for x, _ in line.points})
            axes.set_xticks(values, [f"{x:g}" for x in values])
            axes.minorticks_off()
            axes.set(xlabel=f"{axis} (log scale)", ylabel=title)
        left.set_ylim(bottom=0)
        right.set_yscale("log")
        figure.get_layout_engine().set(wspace=0.06)
        _plain_log(right.yaxis)
        add_legend(figure)

    return to_svg(f"scaling-{axis}", draw, (9.0, 4.2))


def latency_distribution(result: Record, scenario: str) -> str | None:
    """Draw the share of requests answered within a time, for each candidate at one scenario."""
    curves = []
    for i, candidate in enumerate(result["candidates"]):
        for found in candidate["scenarios"]:
            if found["scenario"]["name"] == scenario and found["histogram"]:
                curves.append((i, candidate["name"], found["histogram"]))
    if not curves:
        return None

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        for i, name, histogram in curves:
            share = np.concatenate(([0.0], np.cumsum(histogram["counts"]))) / sum(histogram["counts"])
            axes.plot(histogram["edges_ms"], 100 * share, color=colour_of(i), linewidth=2, label=shown(name))
        axes.set_xscale("log")
        _plain_log(axes.xaxis)
        axes.set(xlabel="latency, ms (log scale)", ylabel="requests answered within, %", ylim=(0, 101))
        add_legend(figure)

    return to_svg("latency", draw)


def throughput_latency(result: Record) -> str | None:
    """Draw p99 against throughput: closed loops joined by a line, random arrivals hollow, p99 limits dotted."""

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        numbers: list[tuple[str, tuple[float, float], str]] = []
        for i, candidate in enumerate(result["candidates"]):
            closed: list[Record] = []
            random: list[Record] = []
            for s in candidate["scenarios"]:
                if s["latency_ms"]["p99"]:
                    (closed if s["scenario"]["kind"] == "closed_loop" else random).append(s)
            for points, style in ((closed, f"-{marker_of(i)}"), (random, "D:")):
                if not points:
                    continue
                x = [s["throughput_per_s"]["median"] for s in points]
                y = [s["latency_ms"]["p99"]["median"] for s in points]
                hollow = {"markerfacecolor": "none", "markersize": 9} if points is random else {}
                label = None if points is random and closed else shown(candidate["name"])
                axes.plot(x, y, style, color=colour_of(i), linewidth=1.5, label=label, clip_on=False, **hollow)
            for s in closed:
                at = (s["throughput_per_s"]["median"], s["latency_ms"]["p99"]["median"])
                numbers.append((str(s["scenario"]["concurrency"]), at, colour_of(i)))
        for limit in {s["scenario"].get("limit_ms") for c in result["candidates"] for s in c["scenarios"]} - {None}:
            axes.axhline(limit, color="grey", linestyle=":", linewidth=1.4)
            at = (1, limit)
            axes.annotate(
                f"p99 limit {limit:g} ms", at, (0, 4), xycoords=("axes fraction", "data"), textcoords="offset points",
                ha="right", fontsize=9,
            )  # fmt: skip
        axes.set_yscale("log")
        _plain_log(axes.yaxis)
        axes.set_xlim(left=0)
        axes.set(xlabel="successful requests per second", ylabel="p99 latency, ms (log scale)")
        axes.margins(y=0.12)
        _write_beside(axes, numbers)
        add_legend(figure)

    if not any(s["latency_ms"]["p99"] for c in result["candidates"] for s in c["scenarios"]):
        return None
    return to_svg("throughput", draw)


def accuracy_speed(result: Record) -> str | None:
    """Draw the task's headline metric against throughput in each candidate's headline scenario."""
    metric = get_task(result["candidates"][0]["task"]).headline
    points = [
        (i, c["name"], headline(c)["throughput_per_s"]["median"], c["metrics"][metric])
        for i, c in enumerate(result["candidates"])
        if c["metrics"]
    ]
    if not points:
        return None

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        for i, name, x, y in points:
            axes.plot([x], [y], marker_of(i), color=colour_of(i), markersize=10, label=shown(name))
        values = [y for *_, y in points]
        # Show at least two points: zoomed in further, noise would look like a difference.
        point = 1.0 / points_of(metric)
        middle, half = (min(values) + max(values)) / 2, max(point, 0.75 * (max(values) - min(values)))
        axes.set_ylim(middle - half, middle + half)
        axes.set_xlim(0, 1.15 * max(x for _, _, x, _ in points) or 1)
        axes.set(xlabel="successful requests per second", ylabel=title_of(metric))
        add_legend(figure)

    return to_svg("accuracy", draw)


def stages(result: Record) -> str | None:
    """Draw the shares of time, in percent, of each translator in this process in its headline scenario."""
    counted = [(c["name"], headline(c)["seconds"]) for c in result["candidates"] if headline(c)["seconds"]]
    if not counted:
        return None

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        left = np.zeros(len(counted))
        for i, stage in enumerate(counted[0][1]):
            share = np.array([100 * seconds[stage] / sum(seconds.values()) for _, seconds in counted])
            axes.barh(range(len(counted)), share, 0.6, left, color=colour_of(i), label=stage)
            for row, (begin, width) in enumerate(zip(left, share)):
                if width >= 5:  # numbers in narrower bars would overlap
                    axes.text(
                        begin + width / 2, row, f"{width:.0f}", ha="center", va="center", fontsize=9, color="#ffffff"
                    )
            left += share
        axes.set_yticks(range(len(counted)), [shown(name) for name, _ in counted])
        axes.invert_yaxis()
        axes.grid(False, axis="y")
        axes.set(xlabel="share of the time, %", xlim=(0, 100))
        add_legend(figure)

    return to_svg("stages", draw, (8.0, 1.6 + 0.42 * len(counted)))


def memory_size(result: Record) -> str | None:
    """Draw peak memory and graph size as bars, in MB."""
    bars = [(c["name"], c["peak_memory_mb"], c["size_mb"]) for c in result["candidates"]]
    if not any(memory or size for _, memory, size in bars):
        return None

    def draw(figure: Any) -> None:
        left, right = figure.subplots(1, 2, sharey=True)
        for axes, values, title in (
            (left, [memory for _, memory, _ in bars], "peak memory, MB"),
            (right, [size for *_, size in bars], "size of the graph, MB"),
        ):
            axes.barh(range(len(bars)), [v or 0 for v in values], 0.6, color=[colour_of(i) for i in range(len(bars))])
            for i, value in enumerate(values):
                text = f"{value:,.0f}" if value else "not known"
                axes.annotate(text, (value or 0, i), (4, 0), textcoords="offset points", va="center", fontsize=10)
            axes.set_title(title, fontsize=11)
            axes.set_xlim(0, 1.25 * max((v for v in values if v), default=1))
            axes.grid(False, axis="y")
            axes.tick_params(axis="y", length=0)
            axes.xaxis.set_major_locator(locator(4))
        left.set_yticks(range(len(bars)), [shown(name) for name, _, _ in bars])
        left.invert_yaxis()

    return to_svg("memory", draw, (9.0, 1.3 + 0.42 * len(bars)))


def generates(result: Record) -> bool:
    """Return whether the candidates, all of one task, generate token by token."""
    return get_task(result["candidates"][0]["task"]).facts.graph_kind != "encoder"


def headline(candidate: Record) -> Record:
    """Return the scenario that a candidate's summary figures come from."""
    found: Record = next(s for s in candidate["scenarios"] if s["scenario"]["name"] == candidate["headline"])
    return found


def _plain_log(axis: Any) -> None:
    """Set ticks at 1, 2 and 5, in plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(10, (1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _write_beside(axes: Any, texts: Sequence[tuple[str, tuple[float, float], str]]) -> None:
    """Write each text above its point or, where it would overlap another, below it, or not at all.

    ``texts`` are (text, point, colour).
    """
    taken: list[Any] = []
    for text, at, colour in texts:
        x, y = axes.transData.transform(at)
        for offset in (9, -11):
            if all(abs(x - a) > 16 or abs(y + offset - b) > 11 for a, b in taken):
                taken.append((x, y + offset))
                place = {"textcoords": "offset points", "ha": "center", "va": "center", "color": colour}
                axes.annotate(text, at, (0, offset), fontsize=9, **place)
                break
