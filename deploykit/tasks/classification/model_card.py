"""Write the parts of a checkpoint's README.md that only a classifier has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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
            f"| {result['mae']:.4g} | {result['rmse']:.4g} | {result['pearson']:.3f} | {result['spearman']:.3f} | {rows:,} |",
        ]
    return [
        "| label | precision | recall | F1 | rows |",
        "|---|---:|---:|---:|---:|",
        *(
            f"| {label} | {m['precision']:.3f} | {m['recall']:.3f} | {m['f1']:.3f} | {m['support']:,} |"
            for label, m in result["per_class"].items()
        ),
        f"| macro | {result['macro_precision']:.3f} | {result['macro_recall']:.3f} | {result['macro_f1']:.3f} | {rows:,} |",
        "",
        f"Accuracy {result['accuracy']:.3f}; expected calibration error {result['expected_calibration_error']:.3f}.",
        *(
            [
                f"95 % intervals over rows (bootstrap): macro F1 {interval(result, 'macro_f1', '.3f')}, accuracy "
                f"{interval(result, 'accuracy', '.3f')}."
            ]
            if "intervals" in result
            else []
        ),
    ]
