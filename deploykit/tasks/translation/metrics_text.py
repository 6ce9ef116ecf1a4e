"""Print the metrics of a translator on a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deploykit.text_table import text_table


def metrics_text(columns: Mapping[str, Mapping[str, Any]]) -> str:
    """Return metrics in columns, each under its name, with the 95 % intervals that were measured."""
    kept = [f"{m['placeholders']['kept']:,} of {m['placeholders']['checked']:,}" for m in columns.values()]
    rows = [[name, *(_value(m, name.lower()) for m in columns.values())] for name in ("BLEU", "chrF")]
    lines = [text_table(["", *columns], [*rows, ["placeholders kept", *kept]])]
    for name, signature in next(iter(columns.values())).get("signatures", {}).items():
        lines.append(f"{name} signature: {signature}")
    return "\n".join(lines)


def _value(metrics: Mapping[str, Any], name: str) -> str:
    if "intervals" not in metrics:
        return f"{metrics[name]:.2f}"
    low, high = metrics["intervals"][name]
    return f"{metrics[name]:.2f} [{low:.2f}, {high:.2f}]"


def result_text(metrics: Mapping[str, Any], held_out: str) -> str:
    """Return the scores before and after training and of a teacher side by side, and some translations."""
    columns = {name: found for name in ("before", "teacher") if (found := metrics.get(name, {}).get(held_out))}
    columns = {**columns, "after" if columns else "": metrics[held_out]}
    lines = [metrics_text(columns)]
    for sample in metrics["samples"]:
        lines.append("")
        lines += [f"{name + ':':<13}{sample[name]}" for name in ("source", "reference", "before", "translation")
                  if name in sample]  # fmt: skip
    return "\n".join(lines)
