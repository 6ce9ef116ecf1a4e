"""Write the parts of a checkpoint's README.md that only a translator has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deploykit.tasks.translation.facts import Translation


def head(task: Translation, origin: str) -> list[str]:
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


def results(metrics: Mapping[str, Any], held_out: str) -> list[str]:
    after, before = metrics[held_out], metrics.get("before", {}).get(held_out)
    teacher = metrics.get("teacher", {}).get(held_out)
    scores = [
        ("after training", after), *([("before", before)] if before else []), *([("teacher", teacher)] if teacher else [])
    ]  # fmt: skip
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
    """Escape a text for a cell of a Markdown table."""
    return "`" + text.replace("|", "\\|").replace("`", "'") + "`"
