"""Print the metrics of a classifier on a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def metrics_text(metrics: Mapping[str, Any]) -> str:
    """Return precision, recall and F1 of each label as a small table; of a regression, its errors and correlations."""
    if "rmse" in metrics:
        return (
            f"mean absolute error {metrics['mae']:.4g}, root mean squared error {metrics['rmse']:.4g}\n"
            f"correlation: Pearson {metrics['pearson']:.4f}, Spearman {metrics['spearman']:.4f}"
        )
    width = max(9, *(len(label) for label in metrics["per_class"])) + 2
    lines = [f"{'label':<{width}}{'precision':>10}{'recall':>8}{'F1':>8}{'rows':>8}"]
    for label, m in metrics["per_class"].items():
        lines.append(f"{label:<{width}}{m['precision']:>10.4f}{m['recall']:>8.4f}{m['f1']:>8.4f}{m['support']:>8,}")
    lines.append(
        f"{'macro':<{width}}{metrics['macro_precision']:>10.4f}{metrics['macro_recall']:>8.4f}{metrics['macro_f1']:>8.4f}"
    )
    lines.append(
        f"accuracy {metrics['accuracy']:.4f}, expected calibration error {metrics['expected_calibration_error']:.4f}"
    )
    return "\n".join(lines)


def qat_text(metrics: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """The four forms of a classifier trained for INT8: before and after, as it is and with its linear layers rounded."""
    lines = [f"{'training for INT8':<20}{'accuracy':>10}{'macro-F1':>10}"]
    for when, forms in metrics.items():
        for form, m in forms.items():
            lines.append(f"{f'{when}, {form}':<20}{m['accuracy']:>10.4f}{m['macro_f1']:>10.4f}")
    return "\n".join(lines)
