"""Draw the figures of a training run: SVG text out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from deploykit.metric_titles import title_of, value_text
from deploykit.report.html import figure, page, section, table, write_page
from deploykit.report.svg import add_legend, colour_of, require_matplotlib, to_svg


def loss_curves(training: Sequence[tuple[int, float]], validation: Sequence[tuple[int, float]]) -> str:
    """Draw the loss (nats a token) by step; the lowest validation loss, whose weights are kept, has a ring.

    ``validation`` may be empty.
    """

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        axes.plot(*zip(*training), color=colour_of(0), linewidth=1.2, label="training")
        if validation:
            axes.plot(*zip(*validation), "-o", color=colour_of(1), markersize=5, label="validation")
            best = min(validation, key=lambda point: point[1])
            axes.plot(*best, "o", color=colour_of(1), markersize=12, fillstyle="none", label="kept")
        axes.set(xlabel="step", ylabel="loss, nats a token")
        axes.set_ylim(bottom=0)
        add_legend(figure)

    return to_svg("losses", draw, (8.0, 3.6))


def length_histogram(lengths: Mapping[str, Sequence[float]]) -> str:
    """Draw how many rows have how many tokens: ``counts`` between neighbours of ``edges``."""

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        axes.stairs(lengths["counts"], lengths["edges"], fill=True, color=colour_of(0))
        axes.set(xlabel="tokens of a row", ylabel="rows")

    return to_svg("lengths", draw, (8.0, 2.8))


def write_learning_curve(curve: Mapping[str, Any], out: Path) -> None:
    """Write the page of a learning curve (``deploykit.stages.repeated_runs``) to ``out``.

    Raises MissingDependencyError without matplotlib.
    """
    require_matplotlib()
    title = f"{title_of(curve['metric'])} by training rows"
    points = [(point["rows"], point["value"]) for point in curve["points"]]
    spread = [(point["rows"], *point["interval"]) for point in curve["points"] if point["interval"]]
    expected = None if curve["expected"] is None else (2 * points[-1][0], curve["expected"])

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        axes.plot(*zip(*points), "-o", color=colour_of(0), label="measured")
        for count, low, high in spread:
            axes.plot([count, count], [low, high], color=colour_of(0), linewidth=1)
        if expected is not None:
            axes.plot(*zip(points[-1], expected), ":", color=colour_of(1))
            axes.plot(
                *zip(expected),
                "o",
                color=colour_of(1),
                fillstyle="none",
                label="expected, from a power law of the error",
            )
        axes.set_xscale("log")
        axes.set(xlabel="training rows (log scale)", ylabel=title_of(curve["metric"]))
        add_legend(figure)

    rows = [[f"{point['rows']:,}", value_text(point["value"], point["interval"])] for point in curve["points"]]
    if expected is not None:
        rows.append([f"{expected[0]:,} (expected)", f"{expected[1]:.4f}"])
    note = "On the same held-out rows, with bootstrap 95 % intervals over them. Each point is one run, so small differences are noise."
    parts = [
        f"<header><h1>{escape(title)}</h1></header>",
        figure("Learning curve", note, to_svg("curve", draw, (8.0, 3.8))),
        section("Points", "", table(("training rows", title_of(curve["metric"])), rows)),
    ]
    write_page(out, page(title, parts))
