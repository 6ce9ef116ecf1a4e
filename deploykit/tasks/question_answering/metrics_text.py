"""Print the metrics of an answerer on a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deploykit.text_table import text_table


def metrics_text(metrics: Mapping[str, Any]) -> str:
    """Return exact match and F1 with intervals, for all questions and for those with and without an answer."""
    parts = {"all": metrics, **{name: metrics[name] for name in ("has_answer", "no_answer") if name in metrics}}
    rows = (
        [name.replace("_", " "), f"{m['exact_match']:.4f}", f"{m['f1']:.4f}", f"{m['rows']:,}"]
        for name, m in parts.items()
    )
    lines = [text_table(["", "exact match", "F1", "rows"], rows)]
    intervals = (f"{name} {low:.4f} to {high:.4f}" for name, (low, high) in _intervals(metrics))
    lines.append(f"95 % intervals: {', '.join(intervals)}")
    if "best_f1" in metrics:
        lines.append(
            f"with the threshold best on these rows, {metrics['best_f1_threshold']:.2f}: F1 {metrics['best_f1']:.4f}"
        )
    return "\n".join(lines)


def _intervals(metrics: Mapping[str, Any]) -> list[tuple[str, tuple[float, float]]]:
    return [("exact match", metrics["exact_match_interval"]), ("F1", metrics["f1_interval"])]
