"""Print the metrics of a translator on a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def metrics_text(columns: Mapping[str, Mapping[str, Any]]) -> str:
    """Return metrics in columns, each under its name."""
    kept = [f"{m['placeholders']['kept']:,} of {m['placeholders']['checked']:,}" for m in columns.values()]
    lines = [f"{'':<18}" + "".join(f"{name:>16}" for name in columns)] if any(columns) else []
    for name in ("BLEU", "chrF"):
        lines.append(f"{name:<18}" + "".join(f"{m[name.lower()]:>16.2f}" for m in columns.values()))
    for name, signature in next(iter(columns.values())).get("signatures", {}).items():
        lines.append(f"{name} signature".ljust(18) + signature)
    lines.append(f"{'placeholders kept':<18}" + "".join(f"{text:>16}" for text in kept))
    return "\n".join(lines)


def result_text(metrics: Mapping[str, Any], held_out: str) -> str:
    """Return the scores before and after training side by side, and some translations."""
    after, before = metrics[held_out], metrics.get("before", {}).get(held_out)
    columns = {"before": before, "after": after} if before else {"": after}
    lines = [metrics_text(columns)]
    for sample in metrics["samples"]:
        lines.append("")
        lines += [f"{name + ':':<13}{sample[name]}" for name in ("source", "reference", "before", "translation")
                  if name in sample]  # fmt: skip
    return "\n".join(lines)
