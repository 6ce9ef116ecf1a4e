"""Draw a classifier's confusion matrix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from deploykit.report.svg import shown, to_svg

MAX_MATRICES = 12
"""Labels of a multi-label result that are drawn."""


def confusion(candidate: Mapping[str, Any]) -> str | None:
    """Draw the confusion matrix: truth in rows, answers in columns, coloured by their share of the row.

    A multi-label result has one small matrix per label, for the first 12.
    """
    matrix = (candidate["metrics"] or {}).get("confusion_matrix")
    if matrix is None:
        return None
    if isinstance(matrix, Mapping):
        matrices = list(matrix.items())[:MAX_MATRICES]
        columns = min(4, len(matrices))
        rows = -(-len(matrices) // columns)

        def draw_small(figure: Any) -> None:
            all_axes = figure.subplots(rows, columns, squeeze=False).ravel()
            for axes, (label, counts) in zip(all_axes, matrices):
                _matrix(axes, counts, ("no", "yes"))
                axes.set_title(shown(label, 20), fontsize=10)
            for axes in all_axes[len(matrices) :]:
                axes.set_axis_off()
            figure.supxlabel("answer", fontsize=11)
            figure.supylabel("truth", fontsize=11)

        return to_svg("confusion", draw_small, (1.9 * columns + 0.6, 1.9 * rows + 0.6))

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        _matrix(axes, matrix, [shown(label, 18) for label in candidate["labels"]])
        axes.set(xlabel="answer", ylabel="truth")

    side = min(12.0, 2.4 + 0.75 * len(matrix))
    return to_svg("confusion", draw, (side + 1.0, side))


def _matrix(axes: Any, counts: Sequence[Sequence[int]], labels: Sequence[str]) -> None:
    values = np.asarray(counts, float)
    share = values / np.maximum(values.sum(axis=1, keepdims=True), 1)
    axes.pcolormesh(share, cmap=_blues(), vmin=0, vmax=1, edgecolors="none")
    axes.invert_yaxis()
    axes.set_aspect("equal")
    axes.grid(False)
    for spine in axes.spines.values():
        spine.set_visible(False)
    ticks = np.arange(len(labels)) + 0.5
    tilted = len(labels) > 4 or max(map(len, labels)) > 9
    axes.set_xticks(ticks, labels, rotation=40 if tilted else 0, ha="right" if tilted else "center")
    axes.set_yticks(ticks, labels)
    axes.tick_params(length=0)
    if len(labels) > 20:
        return  # the numbers would be illegible; the colours are enough
    for row, column in np.ndindex(values.shape):
        text = f"{int(values[row, column]):,}"
        if len(labels) <= 6:
            text += f"\n{100 * share[row, column]:.0f}%"
        colour = "#ffffff" if share[row, column] > 0.4 else "#102040"
        axes.text(column + 0.5, row + 0.5, text, ha="center", va="center", fontsize=9, color=colour)


def _blues() -> Any:
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("blues", ["#e8effd", "#2f6fed", "#123a8c"])
