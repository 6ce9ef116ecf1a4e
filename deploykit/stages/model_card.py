"""Write the README.md of a checkpoint: its task, its data, and its metrics."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deploykit.metric_titles import with_interval
from deploykit.tasks.protocol import TaskFacts
from deploykit.tasks.registry import task_of
from deploykit.training.options import FinetuneOptions
from deploykit.training.rows import held_out


def render(
    task: TaskFacts,
    options: FinetuneOptions,
    rows: Mapping[str, int],
    cleaning: Mapping[str, Mapping[str, int]],
    metrics: Mapping[str, Any],
) -> str:
    """Return Markdown with the hub's metadata header (hub documentation, "Model Cards")."""
    measured = held_out(metrics)
    origin = Path(options.origin).name
    head, results = task_of(task).model_card(task, origin, metrics, measured, rows.get(measured, 0))
    if measured:
        title = f"Results on the {measured} rows ({rows[measured]:,}, none of them seen in training)"
    else:
        title = "Results: not measured, because it was trained on all rows"
    lines = [
        *head,
        "",
        f"## {title}",
        "",
        *results,
        "",
        *(_qat_results(metrics["qat"]) if "qat" in metrics else []),
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
        f"From `{origin}`; every option is in `finetune.toml`, and",
        "`deploykit finetune --config finetune.toml --output-dir DIR` repeats the run.",
        *_learned_besides(options, metrics),
        "",
        "## Limits",
        "",
        "Its answers are as good as its training rows, on text like theirs. The figures above say nothing about "
        "other text, other languages, or later years.",
    ]
    return "\n".join(lines) + "\n"


def _learned_besides(options: FinetuneOptions, metrics: Mapping[str, Any]) -> list[str]:
    """Return a description of the other sources that the run learned from."""
    found = []
    if copies := metrics.get("augmented"):
        told = ", ".join(f"{count:,} with `{noise}`" for noise, count in copies.items())
        found += ["", f"It was also trained on copies of the training rows: {told}."]
    if teacher := getattr(options, "teacher", None):
        if counts := metrics.get("distilled"):
            found += ["", f"Of its training rows {counts['taught']:,} have a teacher's translation."]
        states = " and its hidden states" if getattr(options, "distill_hidden", 0) else ""
        found += ["", f"It has learned from a teacher, `{Path(teacher).name}`{states}, too."]
    return found


def _qat_results(metrics: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[str]:
    return [
        "Trained with the inputs and weights of its linear layers rounded to INT8; `qat.json` has the ranges, which",
        "`deploykit export --int8` takes. On the same rows:",
        "",
        "| | accuracy | macro F1 |",
        "|---|---:|---:|",
        *(
            f"| {when} this training, {form} | {with_interval(m, 'accuracy', digits=3)} | {with_interval(m, 'macro_f1', digits=3)} |"
            for when, forms in metrics.items()
            for form, m in forms.items()
        ),
        "",
    ]
