"""Print the metrics of a translator on a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deploykit.metric_titles import compared_lines, models_of, title_of, with_interval
from deploykit.text_table import text_table

_SHOWN = 300
"""Characters of a sample; a model that has learned little repeats itself to the longest length."""


def metrics_text(columns: Mapping[str, Mapping[str, Any]]) -> str:
    """Return metrics in columns, each under its name, with the 95 % intervals that were measured."""
    kept = [f"{m['placeholders']['kept']:,} of {m['placeholders']['checked']:,}" for m in columns.values()]
    rows = [[title_of(name), *(with_interval(m, name) for m in columns.values())] for name in ("bleu", "chrf")]
    lines = [text_table(["", *columns], [*rows, ["placeholders kept", *kept]])]
    for name, signature in next(iter(columns.values())).get("signatures", {}).items():
        lines.append(f"{name} signature: {signature}")
    return "\n".join(lines)


def result_text(metrics: Mapping[str, Any], held_out: str) -> str:
    """Return the scores before and after training and of a teacher side by side, and some translations."""
    lines = [metrics_text(models_of(metrics, held_out)), *compared_lines(metrics)]
    for sample in metrics["samples"]:
        lines.append("")
        for name in ("source", "reference", "before", "translation"):
            if (text := sample.get(name)) is not None:
                lines.append(f"{name + ':':<13}{text[:_SHOWN]}{'…' if len(text) > _SHOWN else ''}")
    return "\n".join(lines)
