"""The README.md of a checkpoint: what it does, what it was made from, and how well it does it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deploykit.finetune.options import FinetuneOptions
from deploykit.tasks import Classification


def render(
    task: Classification,
    options: FinetuneOptions,
    rows: Mapping[str, int],
    cleaning: Mapping[str, Mapping[str, int]],
    metrics: Mapping[str, Mapping[str, Any]],
) -> str:
    """Markdown with the hub's metadata header (hub documentation, "Model Cards")."""
    held_out = "test" if "test" in metrics else "validation"
    result = metrics[held_out]
    lines = [
        "---",
        "pipeline_tag: text-classification",
        "library_name: transformers",
        "tags: [deploykit]",
        "---",
        "",
        f"# {Path(options.model).name} for {'multi-label ' if task.multi_label else ''}text classification",
        "",
        f"Labels: {', '.join(f'`{label}`' for label in task.labels)}. Texts longer than {task.max_length} tokens are cut.",
        "",
        f"## Results on the {held_out} rows ({rows[held_out]:,}, none of them seen in training)",
        "",
        "| label | precision | recall | F1 | rows |",
        "|---|---:|---:|---:|---:|",
        *(
            f"| {label} | {m['precision']:.3f} | {m['recall']:.3f} | {m['f1']:.3f} | {m['support']:,} |"
            for label, m in result["per_class"].items()
        ),
        f"| macro | {result['macro_precision']:.3f} | {result['macro_recall']:.3f} | {result['macro_f1']:.3f} | {rows[held_out]:,} |",
        "",
        f"Accuracy {result['accuracy']:.3f}; expected calibration error {result['expected_calibration_error']:.3f}.",
        "",
        "## Data",
        "",
        "| rows | " + " | ".join(cleaning) + " |",
        "|---|" + "---:|" * len(cleaning),
        *(
            f"| {step.replace('_', ' ')} | " + " | ".join(f"{counts[step]:,}" for counts in cleaning.values()) + " |"
            for step in next(iter(cleaning.values()))
        ),
        "",
        "Used: " + ", ".join(f"{name} {count:,}" for name, count in rows.items()) + ". No text, nor a near duplicate "
        "of it, is in two of these.",
        "",
        "## Training",
        "",
        f"From `{Path(options.model).name}`; every option is in `finetune.toml`, and",
        "`deploykit finetune --config finetune.toml --out DIR` repeats the run.",
        "",
        "## Limits",
        "",
        "Its answers are as good as its labels, on text like the training text. The figures above say nothing about "
        "other text, other languages, or later years.",
    ]
    return "\n".join(lines) + "\n"
