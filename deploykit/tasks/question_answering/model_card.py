"""Write the parts of a checkpoint's README.md that only an answerer has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deploykit.tasks.question_answering.facts import QuestionAnswering
from deploykit.tasks.question_answering.metrics_text import cell


def head(task: QuestionAnswering, origin: str) -> list[str]:
    """Return the hub's metadata and a description of the model."""
    answers = "It recognizes contexts without an answer." if task.no_answer_threshold is not None else (
        "It answers every question, even if the context has no answer."
    )  # fmt: skip
    return [
        "---",
        "pipeline_tag: question-answering",
        "library_name: transformers",
        "tags: [deploykit]",
        "---",
        "",
        f"# {origin} for extractive question answering",
        "",
        f"A question and a context in, words of the context out. {answers} Contexts are read in windows of "
        f"{task.max_length} tokens that share {task.doc_stride}; an answer has at most {task.max_answer_length} tokens.",
    ]


def results(result: Mapping[str, Any], rows: int) -> list[str]:
    """Return the table of metrics."""
    named = [("all", result), *((name, result[name]) for name in ("has_answer", "no_answer") if name in result)]
    return [
        "| questions | exact match | F1 | rows |",
        "|---|---:|---:|---:|",
        *(
            f"| {name.replace('_', ' ')} | {cell(result, name, 'exact_match')} | {cell(result, name, 'f1')} | {m['rows']:,} |"
            for name, m in named
        ),
        "",
        f"In brackets: bootstrap 95 % intervals over {rows:,} questions.",
    ]
