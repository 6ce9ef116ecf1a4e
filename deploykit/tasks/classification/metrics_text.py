"""Print the metrics of a classifier on a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deploykit.metric_titles import with_interval
from deploykit.text_table import text_table


def metrics_text(metrics: Mapping[str, Any]) -> str:
    """Return precision, recall and F1 of each label as a small table; of a regression, its errors and correlations.

    Metrics that were measured with intervals have them in brackets.
    """
    if "rmse" in metrics:
        return (
            f"mean absolute error {_value(metrics, 'mae', '.4g')}, root mean squared error {_value(metrics, 'rmse', '.4g')}\n"
            f"correlation: Pearson {_value(metrics, 'pearson')}, Spearman {_value(metrics, 'spearman')}{_note(metrics)}"
        )
    names = ("precision", "recall", "f1")
    told = "intervals" in metrics
    rows = [
        [label, *(f"{m[name]:.4f}" for name in names), *([interval(metrics, f"per_class.{label}.f1")] if told else []),
         f"{m['support']:,}"]
        for label, m in metrics["per_class"].items()
    ]  # fmt: skip
    macro = [f"{metrics[f'macro_{name}']:.4f}" for name in names]
    rows.append(["macro", *macro, *([interval(metrics, "macro_f1")] if told else []), ""])
    head = ["label", "precision", "recall", "F1", *(["95 %"] if told else []), "rows"]
    return (
        f"{text_table(head, rows)}\naccuracy {_value(metrics, 'accuracy')}, expected calibration error "
        f"{_value(metrics, 'expected_calibration_error')}{_note(metrics)}"
    )


def interval(metrics: Mapping[str, Any], name: str, form: str = ".4f") -> str:
    """Return the interval of a metric as text, [0.8123, 0.8456]; an empty one if it was not measured."""
    if name not in metrics.get("intervals", {}):
        return ""
    low, high = metrics["intervals"][name]
    return f"[{low:{form}}, {high:{form}}]"


def _value(metrics: Mapping[str, Any], name: str, form: str = ".4f") -> str:
    return f"{metrics[name]:{form}}" + (f" {interval(metrics, name, form)}" if "intervals" in metrics else "")


def _note(metrics: Mapping[str, Any]) -> str:
    return "\n(in brackets bootstrap 95 % intervals over rows)" if "intervals" in metrics else ""


def qat_text(metrics: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """Return the four forms of a classifier trained for INT8: before and after, as it is and with its linear layers rounded."""
    rows = (
        [f"{when}, {form}", *(with_interval(m, name) for name in ("accuracy", "macro_f1"))]
        for when, forms in metrics.items()
        for form, m in forms.items()
    )
    return text_table(["training for INT8", "accuracy", "macro-F1"], rows)
