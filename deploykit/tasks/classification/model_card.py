"""Write the parts of a checkpoint's README.md that only a classifier has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deploykit.metric_titles import with_interval
from deploykit.tasks.classification.facts import Classification
from deploykit.tasks.classification.metrics_text import interval


def head(task: Classification, origin: str) -> list[str]:
    kind = "text regression" if task.regression else f"{'multi-label ' if task.multi_label else ''}text classification"
    answers = (
        f"Answers a number, `{task.labels[0]}`."
        if task.regression
        else f"Labels: {', '.join(f'`{label}`' for label in task.labels)}."
    )
    return [
        "---",
        "pipeline_tag: text-classification",
        "library_name: transformers",
        "tags: [deploykit]",
        "---",
        "",
        f"# {origin} for {kind}",
        "",
        f"{answers} Texts longer than {task.max_length} tokens are cut.",
    ]


def results(result: Mapping[str, Any], rows: int) -> list[str]:
    if "rmse" in result:
        return [
            "| mean absolute error | root mean squared error | Pearson | Spearman | rows |",
            "|---:|---:|---:|---:|---:|",
            "| "
            + " | ".join(with_interval(result, name) for name in ("mae", "rmse", "pearson", "spearman"))
            + f" | {rows:,} |",
        ]
    return [
        "| label | precision | recall | F1 | 95 % | rows |",
        "|---|---:|---:|---:|---:|---:|",
        *(
            f"| {label} | {m['precision']:.3f} | {m['recall']:.3f} | {m['f1']:.3f} | "
            f"{interval(result, f'per_class.{label}.f1', '.3f')} | {m['support']:,} |"
            for label, m in result["per_class"].items()
        ),
        f"| macro | {result['macro_precision']:.3f} | {result['macro_recall']:.3f} | {result['macro_f1']:.3f} | "
        f"{interval(result, 'macro_f1', '.3f')} | {rows:,} |",
        "",
        f"Accuracy {with_interval(result, 'accuracy', digits=3)}; expected calibration error "
        f"{with_interval(result, 'expected_calibration_error', digits=3)}."
        + (
            " The intervals of labels are those of F1; all are by bootstrap over rows." if "intervals" in result else ""
        ),
    ]
