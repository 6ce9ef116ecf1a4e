"""Write the parts of a checkpoint's README.md that only a translator has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deploykit.metric_titles import compared_lines, models_of, with_interval
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
    after, models = metrics[held_out], models_of(metrics, held_out)
    return [
        "| | BLEU | chrF | placeholders kept |",
        "|---|---:|---:|---:|",
        *(
            f"| {name or 'after'} | {with_interval(m, 'bleu')} | {with_interval(m, 'chrf')} | "
            f"{m['placeholders']['kept']:,} of {m['placeholders']['checked']:,} |"
            for name, m in models.items()
        ),
        "",
        "In brackets: bootstrap 95 % intervals over rows.",
        *(f"{line[0].upper()}{line[1:]}." for line in compared_lines(metrics)),
        "",
        f"sacrebleu: `{after['signatures']['bleu']}`, `{after['signatures']['chrf']}`.",
        "",
        "| source | " + ("before | " if "before" in models else "") + "translation | reference |",
        "|---|---|---|" + ("---|" if "before" in models else ""),
        *(
            "| " + " | ".join(_cell(s[k]) for k in ("source", "before", "translation", "reference") if k in s) + " |"
            for s in metrics["samples"]
        ),
    ]


def _cell(text: str) -> str:
    """Escape a text for a cell of a Markdown table."""
    return "`" + text.replace("|", "\\|").replace("`", "'") + "`"
