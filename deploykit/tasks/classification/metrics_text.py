"""Print the metrics of a classifier on a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deploykit.text_table import text_table


def metrics_text(metrics: Mapping[str, Any]) -> str:
    """Return precision, recall and F1 of each label as a small table; of a regression, its errors and correlations."""
    if "rmse" in metrics:
        return (
            f"mean absolute error {metrics['mae']:.4g}, root mean squared error {metrics['rmse']:.4g}\n"
            f"correlation: Pearson {metrics['pearson']:.4f}, Spearman {metrics['spearman']:.4f}"
        )
    names = ("precision", "recall", "f1")
    rows = [
        [label, *(f"{m[name]:.4f}" for name in names), f"{m['support']:,}"] for label, m in metrics["per_class"].items()
    ]
    rows.append(["macro", *(f"{metrics[f'macro_{name}']:.4f}" for name in names), ""])
    return (
        f"{text_table(['label', 'precision', 'recall', 'F1', 'rows'], rows)}\n"
        f"accuracy {metrics['accuracy']:.4f}, expected calibration error {metrics['expected_calibration_error']:.4f}"
    )


def qat_text(metrics: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """The four forms of a classifier trained for INT8: before and after, as it is and with its linear layers rounded."""
    rows = (
        [f"{when}, {form}", f"{m['accuracy']:.4f}", f"{m['macro_f1']:.4f}"]
        for when, forms in metrics.items()
        for form, m in forms.items()
    )
    return text_table(["training for INT8", "accuracy", "macro-F1"], rows)
