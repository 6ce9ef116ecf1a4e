"""The README.md of a checkpoint: what it does, what it was made from, and how well it does it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deploykit.finetune.options import FinetuneOptions
from deploykit.tasks import Classification, Task, Translation


def render(
    task: Task,
    options: FinetuneOptions,
    rows: Mapping[str, int],
    cleaning: Mapping[str, Mapping[str, int]],
    metrics: Mapping[str, Any],
) -> str:
    """Markdown with the hub's metadata header (hub documentation, "Model Cards")."""
    held_out = "test" if "test" in metrics else "validation"
    origin = Path(options.origin).name
    head, results = (
        (_classification_head(task, origin), _classification_results(metrics[held_out], rows[held_out]))
        if isinstance(task, Classification)
        else (_translation_head(task, origin), _translation_results(metrics, held_out))
    )
    lines = [
        *head,
        "",
        f"## Results on the {held_out} rows ({rows[held_out]:,}, none of them seen in training)",
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
        "`deploykit finetune --config finetune.toml --out DIR` repeats the run.",
        "",
        "## Limits",
        "",
        "Its answers are as good as its training rows, on text like theirs. The figures above say nothing about "
        "other text, other languages, or later years.",
    ]
    return "\n".join(lines) + "\n"


def _classification_head(task: Classification, origin: str) -> list[str]:
    return [
        "---",
        "pipeline_tag: text-classification",
        "library_name: transformers",
        "tags: [deploykit]",
        "---",
        "",
        f"# {origin} for {'multi-label ' if task.multi_label else ''}text classification",
        "",
        f"Labels: {', '.join(f'`{label}`' for label in task.labels)}. Texts longer than {task.max_length} tokens are cut.",
    ]


def _classification_results(result: Mapping[str, Any], rows: int) -> list[str]:
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
    ]


def _qat_results(metrics: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[str]:
    return [
        "Trained with the inputs and weights of its linear layers rounded to INT8; `qat.json` has the ranges, which",
        "`deploykit export --int8` takes. On the same rows:",
        "",
        "| | accuracy | macro F1 |",
        "|---|---:|---:|",
        *(
            f"| {when} this training, {form} | {m['accuracy']:.3f} | {m['macro_f1']:.3f} |"
            for when, forms in metrics.items()
            for form, m in forms.items()
        ),
        "",
    ]


def _translation_head(task: Translation, origin: str) -> list[str]:
    return [
        "---",
        "pipeline_tag: translation",
        "library_name: transformers",
        f"language: [{task.source}, {task.target}]",
        "tags: [deploykit]",
        "---",
        "",
        f"# {origin} for translation from {task.source} to {task.target}",
        "",
        f"Texts of up to {task.max_source_length} tokens; a search with beam size {task.generation.beam_size} unless asked otherwise.",
    ]


def _translation_results(metrics: Mapping[str, Any], held_out: str) -> list[str]:
    after, before = metrics[held_out], metrics.get("before", {}).get(held_out)
    scores = [("after training", after), *([("before", before)] if before else [])]
    return [
        "| | BLEU | chrF | placeholders kept |",
        "|---|---:|---:|---:|",
        *(
            f"| {when} | {m['bleu']:.1f} | {m['chrf']:.1f} | {m['placeholders']['kept']:,} of {m['placeholders']['checked']:,} |"
            for when, m in scores
        ),
        "",
        f"sacrebleu: `{after['signatures']['bleu']}`, `{after['signatures']['chrf']}`.",
        "",
        "| source | " + ("before | " if before else "") + "translation | reference |",
        "|---|---|---|" + ("---|" if before else ""),
        *(
            "| " + " | ".join(_cell(s[k]) for k in ("source", "before", "translation", "reference") if k in s) + " |"
            for s in metrics["samples"]
        ),
    ]


def _cell(text: str) -> str:
    """A text as it is, in a Markdown table."""
    return "`" + text.replace("|", "\\|").replace("`", "'") + "`"
