"""Write the page of a search: its history, the importance of the options, and all runs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from deploykit.hyperparameters.limits import UNITS, ruled_out
from deploykit.metric_titles import title_of, value_text
from deploykit.report.html import figure, page, section, table, word_table, write_page
from deploykit.report.svg import INK, add_legend, colour_of, fraction, number, shown, to_svg

Record = Mapping[str, Any]


def write_search_page(record: Record, out: Path) -> None:
    """Write the ``record`` of a search to the HTML file ``out``."""
    ended = [run for run in record["runs"] if run["value"] is not None]
    title = f"Search for {title_of(record['objective'] or 'the best run')}: {len(record['runs'])} runs"
    parts = [
        f"<header><h1>{escape(title)}</h1></header>",
        section("Best run", "The first run has the given options.", _best(record)),
        figure("History", "On the validation rows. Crosses: runs that were ended early, at their last evaluation; hollow: "
               "outside the limits.", _history(record) if ended else None),
        figure("Importance", "Share of each option in the differences between the runs (fANOVA).",
               _importance(record["importance"]) if record["importance"] else None),
        figure("Options of the runs", "One line per finished run. Darker is better; the best run is orange.",
               _parallel(record, ended) if len(ended) > 1 and len(record["space"]) > 1 else None),
        section("All runs", "", _table(record)),
    ]  # fmt: skip
    write_page(out, page(title, parts))


def _best(record: Record) -> str:
    told = [
        f"at most {limit:g} {UNITS[name]}, in INT8" for name, limit in record["limits"].items() if limit is not None
    ]
    pairs = [("Objective", title_of(record["objective"] or "")), *([("Limits", ", ".join(told))] if told else [])]
    if len(record["runs"]) < record["asked"]:
        pairs.append(("Runs", f"{len(record['runs'])} of {record['asked']}: --search-time ended the search"))
    ended = [run for run in record["runs"] if run["value"] is not None]
    if out := [run for run in ended if not run["fits"]]:
        pairs.append(("Ruled out", f"{len(out)} of {len(ended)} finished runs; the table of all runs says why"))
    if record["best"] is None:
        return word_table([*pairs, ("Best run", "none is within the limits")])
    best, first = record["runs"][record["best"]], record["runs"][0]
    pairs += [("Best run", f"run {best['run']}: {value_text(best['value'], best.get('interval'))}")]
    if first["value"] is not None:
        pairs += [("First run", value_text(first["value"], first.get("interval")))]
    return word_table([*pairs, *((name, _cell(value)) for name, value in best["options"].items())])


def _history(record: Record) -> str:
    sign = -1 if record["lower_is_better"] else 1

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        best: list[tuple[int, float]] = []
        for run in record["runs"]:
            value = run["value"]
            if value is None and run["state"] == "pruned" and run["selections"]:
                last = run["selections"][max(run["selections"], key=int)]
                # The evaluations show the metric that steps are chosen by, which may differ from the objective.
                axes.plot([run["run"]], [sign * last], "x", color=colour_of(8))
            elif value is not None:
                fill = colour_of(0) if run["fits"] else "none"
                axes.plot([run["run"]], [value], "o", color=colour_of(0), markerfacecolor=fill, markersize=5)
                if run["fits"] and (not best or sign * value > sign * best[-1][1]):
                    best.append((run["run"], value))
        if best:
            best.append((len(record["runs"]) - 1, best[-1][1]))
            axes.step(*zip(*best), where="post", color=colour_of(1), linewidth=1.6, label="best so far")
            add_legend(figure)
        axes.set(xlabel="run", ylabel=title_of(record["objective"]))

    return to_svg("history", draw, (8.0, 3.6))


def _importance(importance: Mapping[str, float]) -> str:
    def draw(figure: Any) -> None:
        axes = figure.subplots()
        for i, value in enumerate(importance.values()):
            axes.barh(i, 100 * value, 0.6, color=colour_of(0))
            axes.annotate(f"{100 * value:.0f} %", (100 * value, i), (5, 0), textcoords="offset points", va="center")
        axes.set_yticks(range(len(importance)), [shown(name) for name in importance])
        axes.invert_yaxis()
        axes.grid(False, axis="y")
        axes.set_xlim(0, 115 * max(importance.values()) or 1)
        axes.set_xlabel("share, %")

    return to_svg("importance", draw, (8.0, 0.9 + 0.4 * len(importance)))


def _parallel(record: Record, ended: Sequence[Record]) -> str:
    """Draw an axis for each option, and for the objective."""
    space = record["space"]
    values = [run["value"] for run in ended]
    low, high = min(values), max(values)
    better = [(v - low) / (high - low or 1.0) for v in values]
    if record["lower_is_better"]:
        better = [1 - share for share in better]

    def height(name: str, value: Any) -> float:
        entry = space[name]
        if "values" in entry:
            return float(entry["values"].index(value) / max(1, len(entry["values"]) - 1))
        scale = math.log if entry["log"] else float
        return float((scale(value) - scale(entry["low"])) / (scale(entry["high"]) - scale(entry["low"])))

    def draw(figure: Any) -> None:
        from matplotlib.colors import to_rgba

        axes = figure.subplots()
        for run, share in sorted(zip(ended, better), key=lambda pair: pair[1]):
            line = [height(name, run["options"][name]) for name in space] + [(run["value"] - low) / (high - low or 1.0)]
            best = run["run"] == record["best"]
            colour = colour_of(1) if best else to_rgba(colour_of(0), 0.15 + 0.75 * share)
            axes.plot(range(len(line)), line, color=colour, linewidth=2.4 if best else 1.2)
        for i, name in enumerate([*space, ""]):
            axes.axvline(i, color=INK, linewidth=0.8)
            for at, text in _ticks(space[name]) if name else ((0.0, fraction(low)), (1.0, fraction(high))):
                axes.annotate(text, (i, at), (4, 0), textcoords="offset points", fontsize=9, va="center")
        names = [shown(name.replace("per_device_train_", ""), 18) for name in space]
        axes.set_xticks(range(len(space) + 1), [*names, title_of(record["objective"])], fontsize=9)
        axes.set_yticks([])
        axes.grid(False)
        axes.spines["left"].set_visible(False)

    return to_svg("parallel", draw, (1.6 * (len(space) + 1) + 1, 4.0))


def _ticks(entry: Record) -> list[tuple[float, str]]:
    if "values" in entry:
        last = max(1, len(entry["values"]) - 1)
        return [(i / last, shown(str(value), 14)) for i, value in enumerate(entry["values"])]
    return [(0.0, f"{entry['low']:.3g}"), (1.0, f"{entry['high']:.3g}")]


def _table(record: Record) -> str:
    limited = any(run["size_mb"] is not None for run in record["runs"])
    head = [
        "run",
        title_of(record["objective"] or "objective"),
        *record["space"],
        *(("MB", "p50 ms") if limited else ()),
    ]
    rows = []
    for run in record["runs"]:
        best = "<small>best</small>" if run["run"] == record["best"] else ""
        out = "".join(f"<small>ruled out: {escape(reason)}</small>" for reason in ruled_out(run, record["limits"]))
        state = {"pruned": "ended early", "fail": f"failed: {run['error']}", "running": "running"}.get(run["state"], "")
        cells = [
            f"{run['run']}{best}",
            escape(state) if run["value"] is None else value_text(run["value"], run.get("interval")) + out,
        ]
        cells += [escape(_cell(run["options"].get(name, ""))) for name in record["space"]]
        cells += [number(run[name]) for name in ("size_mb", "p50_ms")] if limited else []
        rows.append([*cells, number(run["seconds"])])
    return table((*head, "seconds"), rows)


def _cell(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
