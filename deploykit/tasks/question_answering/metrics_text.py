"""Print the metrics of an answerer on a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deploykit.metric_titles import value_text
from deploykit.text_table import text_table


def metrics_text(metrics: Mapping[str, Any]) -> str:
    """Return exact match and F1 with intervals, for all questions and for those with and without an answer."""
    parts = {"all": metrics, **{name: metrics[name] for name in ("has_answer", "no_answer") if name in metrics}}
    rows = (
        [name.replace("_", " "), *(cell(metrics, name, metric) for metric in ("exact_match", "f1")), f"{m['rows']:,}"]
        for name, m in parts.items()
    )
    lines = [text_table(["", "exact match", "F1", "rows"], rows), "(in brackets bootstrap 95 % intervals)"]
    if "best_f1" in metrics:
        lines.append(
            f"with the threshold best on these rows, {metrics['best_f1_threshold']:.2f}: F1 {metrics['best_f1']:.4f}"
        )
    return "\n".join(lines)


def cell(metrics: Mapping[str, Any], part: str, metric: str) -> str:
    """Return a metric of "all" questions, or those of a ``part``, with its interval."""
    value, key = (metrics[metric], metric) if part == "all" else (metrics[part][metric], f"{part}.{metric}")
    return value_text(value, metrics["intervals"][key])
