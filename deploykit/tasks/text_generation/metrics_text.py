"""Print the metrics of a language model on a terminal, and on its model card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from deploykit.metric_titles import compared_lines, models_of
from deploykit.text_table import text_table

TITLES: Mapping[str, str] = {
    "loss": "loss (nats a token)",
    "perplexity": "perplexity",
    "bits_per_byte": "bits per byte",
    "token_accuracy": "token accuracy",
    "exact_match": "exact match",
    "extracted_match": "extracted answer",
    "first_word": "first word",
    "token_f1": "token F1",
    "rouge_l": "ROUGE-L",
    "chrf": "chrF",
    "parses": "parses",
}


def metrics_text(columns: Mapping[str, Mapping[str, Any]]) -> str:
    """Return metrics side by side, under their names, each with its 95 % interval."""
    rows = ([title, *(cell(metrics, name) for metrics in columns.values())] for name, title in shown(columns))
    lines = [text_table(["", *columns], rows)]
    answered = {m["answered"] for m in columns.values() if m.get("answered")}
    if answered:
        lines.append(f"(answers of {max(answered):,} rows; in brackets bootstrap 95 % intervals)")
    return "\n".join(lines)


def shown(columns: Mapping[str, Mapping[str, Any]]) -> Sequence[tuple[str, str]]:
    """Return the metrics that any column has, with their titles."""
    return [(name, title) for name, title in TITLES.items() if any(name in m for m in columns.values())]


def cell(metrics: Mapping[str, Any], name: str) -> str:
    if name not in metrics:
        return "-"
    low, high = metrics["intervals"][name]
    digits = 2 if name in ("perplexity", "chrf") else 3
    return f"{metrics[name]:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def result_text(metrics: Mapping[str, Any], held_out: str) -> str:
    """Return metrics before and after side by side, and some answers."""
    lines = [metrics_text(models_of(metrics, held_out)), *compared_lines(metrics)]
    for sample in metrics["samples"]:
        lines.append("")
        lines += [
            f"{name + ':':<11}{sample[name]}" for name in ("prompt", "reference", "before", "answer") if name in sample
        ]
    return "\n".join(lines)
