"""Draw the figures of a training run: SVG text out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from deploykit.report.figures import add_legend, colour_of, to_svg


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
