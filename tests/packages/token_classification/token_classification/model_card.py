"""Write a token classifier's part of a checkpoint's README.md."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from token_classification.facts import TokenClassification


def head(task: TokenClassification, origin: str) -> list[str]:
    return [
        "---",
        "pipeline_tag: token-classification",
        "library_name: transformers",
        "tags: [deploykit]",
        "---",
        "",
        f"# {origin} for token classification",
        "",
        f"Labels: {', '.join(f'`{label}`' for label in task.labels)}. Words beyond {task.max_length} tokens are `O`.",
    ]


def results(metrics: Mapping[str, Any], rows: int) -> list[str]:
    return [
        "| entity | precision | recall | F1 | count |",
        "|---|---:|---:|---:|---:|",
        *(
            f"| {kind} | {m['precision']:.3f} | {m['recall']:.3f} | {m['f1']:.3f} | {m['support']:,} |"
            for kind, m in metrics["per_kind"].items()
        ),
        f"| all | {metrics['entity_precision']:.3f} | {metrics['entity_recall']:.3f} | {metrics['entity_f1']:.3f} "
        f"| {rows:,} rows |",
        "",
        f"Accuracy of words {metrics['accuracy']:.3f}.",
    ]
