"""Parts of the page of ``evaluate --report`` that are the same for every task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from deploykit.metric_titles import title_of
from deploykit.report.html import figure, page, section, table, word_table, write_page
from deploykit.report.svg import INK, add_legend, colour_of, number, require_matplotlib, shown, to_svg

Record = Mapping[str, Any]

_SHOWN_SLICES = 40


def write_report(title: str, parts: Sequence[str], out: Path) -> None:
    """Write the HTML file ``out``."""
    write_page(out, page(title, [f"<header><h1>{escape(title)}</h1></header>", *parts]))


def write_text_report(title: str, record: Record, out: Path, *, correct: str = "", confidence: str = "") -> None:
    """Write the page of a task whose answers are texts. ``correct`` and ``confidence`` say what the calibration compares, if
    there is one.

    Raises MissingDependencyError without matplotlib.
    """
    require_matplotlib()
    parts = [
        metrics_section(record),
        *slices_parts(record),
        *(calibration_parts(record["calibration"], correct, confidence) if "calibration" in record else ()),
        *(robustness_parts(record["robustness"]) if "robustness" in record else ()),
        worst_section(record["worst"]),
        *(drift_parts(record["drift"]) if "drift" in record else ()),
    ]
    write_report(title, parts, out)


def metrics_section(record: Record) -> str:
    metrics = record["metrics"]
    rows = []
    for name, (low, high) in metrics["intervals"].items():
        value: Any = metrics
        for key in name.split("."):
            value = value[key]
        rows.append((title_of(name), f"{value:.4f}  [{low:.4f}, {high:.4f}]"))
    note = f"On {record['rows']:,} rows. In brackets: bootstrap 95 % intervals over rows."
    return section("Metrics", note, word_table(rows))


def slices_parts(record: Record) -> list[str]:
    slices = record["slices"]
    if not slices:
        return []
    names = list(slices[0]["intervals"])
    rows = [
        [
            escape(one["slice"]) + ("<small>worse than all rows, beyond noise</small>" if one["worse"] else ""),
            f"{one['rows']:,}",
            *(with_interval(one, name) for name in names),
        ]
        for one in slices
    ]
    note = "Worst first; slices of fewer than 10 rows are left out. Bars: bootstrap 95 % intervals; dotted: all rows."
    return [
        figure("Slices", note, _slice_figure(slices[:_SHOWN_SLICES], names[0], record["metrics"][names[0]])),
        section("All slices", "", table(("slice", "rows", *map(title_of, names)), rows)),
    ]


def robustness_parts(lines: Sequence[Record]) -> list[str]:
    names = list(lines[0]["intervals"])
    rows = [[one["noise"], *(with_interval(one, name) for name in names)] for one in lines]
    note = "The same rows with a letter mistyped in 20 % of the words, in the other case, and with other punctuation."
    return [section("Robustness", note, table(("", *map(title_of, names)), rows))]


def with_interval(record: Record, name: str) -> str:
    """Return a cell with a metric and its interval."""
    low, high = record["intervals"][name]
    return f"{record[name]:.4f}<small>{low:.4f} to {high:.4f}</small>"


def _slice_figure(slices: Sequence[Record], metric: str, whole: float) -> str:
    def draw(figure: Any) -> None:
        axes = figure.subplots()
        for i, one in enumerate(slices):
            low, high = one["intervals"][metric]
            colour = colour_of(4) if one["worse"] else colour_of(0)
            axes.plot([low, high], [i, i], color=colour, linewidth=2)
            axes.plot([one[metric]], [i], "o", color=colour, markersize=6)
        axes.axvline(whole, color=INK, linestyle=":", linewidth=1.2)
        axes.set_yticks(range(len(slices)), [shown(f"{one['slice']} ({one['rows']:,})", 44) for one in slices])
        axes.invert_yaxis()
        axes.set_xlabel(title_of(metric))

    return to_svg("slices", draw, (9.0, 1.0 + 0.32 * len(slices)))


def reliability_figure(lines: Sequence[Record], confidence: str = "confidence") -> str:
    def draw(figure: Any) -> None:
        axes = figure.subplots()
        axes.plot([0, 1], [0, 1], ":", color=INK, linewidth=1.2, label="perfect")
        most = max(one["rows"] for one in lines)
        points = [(one["confidence"], one["accuracy"]) for one in lines]
        axes.plot(*zip(*points), color=colour_of(0), linewidth=1.2, label="the model")
        for one, (x, y) in zip(lines, points):
            axes.plot([x], [y], "o", color=colour_of(0), markersize=3 + 9 * (one["rows"] / most) ** 0.5)
        axes.set(xlabel=confidence, ylabel="share of right answers", ylim=(0, 1.02))
        add_legend(figure)

    note = "Below the line, the model is overconfident. The size of a point shows the number of rows."
    return figure("Reliability", note, to_svg("reliability", draw, (6.0, 4.2)))


def calibration_parts(calibration: Record, correct: str, confidence: str) -> list[str]:
    low, high = calibration["interval"]
    words = [
        ("Expected calibration error", f"{calibration['error']:.4f}  [{low:.4f}, {high:.4f}]"),
        ("Confidence", confidence),
        ("Right", correct),
    ]
    return [reliability_figure(calibration["reliability"], confidence), section("Calibration", "", word_table(words))]


def worst_section(rows: Sequence[Record]) -> str:
    """Show the worst rows, each with ``origin``, ``asked``, ``expected``, ``answer``, and numbers by name."""
    if not rows:
        return ""
    names = [name for name, value in rows[0].items() if isinstance(value, float)]
    cells = [
        [escape(one["origin"]), escape(one["asked"]), escape(one["expected"]), escape(one["answer"]),
         *(f"{one[name]:.3f}" for name in names)]
        for one in rows
    ]  # fmt: skip
    head = ("row", "asked", "expected", "answer", *map(title_of, names))
    note = f"The {len(rows)} with the lowest {title_of(names[0])}; among equal ones the highest confidence first."
    return section("Worst rows", note, table(head, cells, words=True))


def drift_parts(drift: Record) -> list[str]:
    rows = [
        [escape(one["property"]), number(one["before"]), number(one["after"]), f"{one['statistic']:.3f}", f"{one['p']:.2g}",
         "drifts" if one["drifts"] else "no"]
        for one in drift["tests"]
    ]  # fmt: skip
    words = ", ".join(
        f"{one['word']} ({100 * one['before']:.1f} → {100 * one['after']:.1f} %)" for one in drift["words"]
    )
    note = f"{drift['rows']:,} new rows; {drift['unknown_words']:,} of their words are new. Means; Kolmogorov-Smirnov tests."
    head = ("", "measured rows", "new rows", "distance", "p", "")
    body = table(head, rows) + word_table([("Words that became more frequent", words or "none")])
    return [section("Drift", note, body)]
