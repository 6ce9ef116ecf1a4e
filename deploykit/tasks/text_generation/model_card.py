"""Write the parts of a checkpoint's README.md that only a language model has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deploykit.metric_titles import compared_lines, models_of
from deploykit.tasks.text_generation.facts import TextGeneration
from deploykit.tasks.text_generation.metrics_text import cell, shown


def head(task: TextGeneration, origin: str) -> list[str]:
    return [
        "---",
        "pipeline_tag: text-generation",
        "library_name: transformers",
        "tags: [deploykit, sft]",
        "---",
        "",
        f"# {origin}, fine-tuned on prompts and answers",
        "",
        f"A context of {task.max_length:,} tokens. The chat template is in `chat_template.jinja`.",
    ]


def results(metrics: Mapping[str, Any], held_out: str) -> list[str]:
    columns = models_of(metrics, held_out)
    return [
        "| | " + " | ".join(columns) + " |",
        "|---|" + "---:|" * len(columns),
        *(
            f"| {title} | " + " | ".join(cell(values, name) for values in columns.values()) + " |"
            for name, title in shown(columns)
        ),
        "",
        "In brackets: bootstrap 95 % intervals over rows.",
        *(f"{line[0].upper()}{line[1:]}." for line in compared_lines(metrics)),
        "",
        *(line for sample in metrics["samples"] for line in _sample(sample)),
    ]


def _sample(sample: Mapping[str, str]) -> list[str]:
    return [f"- {name}: `{' '.join(text.split()).replace('`', chr(39))}`" for name, text in sample.items()] + [""]
