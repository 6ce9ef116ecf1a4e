"""Write the page of a fine-tuning run: losses, lengths, answers before, during and after, and measurements of an export."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from statistics import median
from typing import Any

from deploykit.metric_titles import models_of, with_interval
from deploykit.report import training_figures
from deploykit.report.html import figure, page, section, table, word_table, write_page
from deploykit.report.pages import bench_parts
from deploykit.report.svg import require_matplotlib
from deploykit.tasks.text_generation.metrics_text import cell, shown
from deploykit.training.rows import held_out

FILE = "report.html"
"""Of a run."""

_FORMS = ("precision", "loss", "perplexity", "token_accuracy", "agreement")


def write_run_page(
    title: str, metrics: Mapping[str, Any], out: Path, *, export: Mapping[str, Any] | None = None,
    bench: Mapping[str, Any] | None = None, served: Sequence[Any] = (),
) -> None:  # fmt: skip
    """Write the page of a run with the ``metrics`` of its manifest to ``out``.

    ``export`` are the metrics of an export's manifest, ``bench`` the record of ``deploykit bench`` (speeds), ``served``
    the loads (``StreamLoad``) that a server was asked under. Raises MissingDependencyError without matplotlib.
    """
    require_matplotlib()
    history = metrics["history"]
    parts = [
        f"<header><h1>{escape(title)}</h1></header>",
        *([_held_out(metrics, split)] if (split := held_out(metrics)) else []),
        figure(
            "Loss", "Of a supervised token. Step 0 is the checkpoint before training.",
            training_figures.loss_curves(
                [(step["step"], step["loss"]) for step in history["steps"]],
                [(evaluation["step"], evaluation["loss"]) for evaluation in history["evaluations"]],
            ),
        ),
        section("Training", "", word_table(_training(history))),
        figure("Lengths of the training rows", "Chat template included.", training_figures.length_histogram(metrics["lengths"])),
        *_answers_while_training(metrics["questions"], history["evaluations"]),
        *_samples(metrics["samples"]),
        *([] if export is None else _quantization(export)),
        *([] if bench is None else bench_parts(bench)),
        *([_streams(served)] if served else []),
    ]  # fmt: skip
    write_page(out, page(title, parts))


def _streams(loads: Sequence[Any]) -> str:
    head = ("clients at once", "answers", "tokens/s", "first token p50 ms", "p99 ms", "between tokens p50 ms", "p99 ms")
    rows = [
        [
            str(load.concurrency), str(load.requests), f"{load.tokens_per_s:.0f}", f"{load.first_token_p50_ms:.0f}",
            f"{load.first_token_p99_ms:.0f}", f"{load.between_tokens_p50_ms:.0f}", f"{load.between_tokens_p99_ms:.0f}",
        ]
        for load in loads
    ]  # fmt: skip
    return section("Served: streams of the openai client", "Tokens/s of all clients together.", table(head, rows))


def _held_out(metrics: Mapping[str, Any], split: str) -> str:
    columns = models_of(metrics, split)
    rows = [[escape(name), *(cell(values, key) for values in columns.values())] for key, name in shown(columns)]
    note = "None was seen in training. In brackets: bootstrap 95 % intervals over rows."
    return section(f"On the {split} rows", note, table(("", *columns), rows))


def _training(history: Mapping[str, Any]) -> list[tuple[str, str]]:
    speeds = [step["tokens_per_second"] for step in history["steps"]]
    return [
        ("Steps", f"{max(entry['step'] for entry in (*history['steps'], *history['evaluations'])):,}"),
        ("Tokens/s", f"{median(speeds):,.0f} (median; {min(speeds):,.0f} to {max(speeds):,.0f}), evaluations included"),
    ]


def _answers_while_training(
    questions: Sequence[Mapping[str, str]], evaluations: Sequence[Mapping[str, Any]]
) -> list[str]:
    parts = []
    for i, question in enumerate(questions):
        answers = [(f"step {e['step']:,}", e["answers"][i]) for e in evaluations if len(e["answers"]) > i]
        note = f"Right: {question['reference']}"
        parts.append(section(f"While training: {question['prompt']}", note, word_table(answers)))
    return parts


def _samples(samples: Sequence[Mapping[str, str]]) -> list[str]:
    if not samples:
        return []
    names = ("prompt", "reference", "before", "answer")
    body = table(names, [[escape(sample.get(name, "")) for name in names] for sample in samples], words=True)
    return [section("Held-out rows before and after", "", body)]


def _quantization(export: Mapping[str, Any]) -> list[str]:
    lines = export["accuracy_table"]
    head = [name.replace("_", " ") for name in _FORMS]
    rows = [
        [escape(f"{line['precision']} ({line['engine']})"), *(with_interval(line, name) for name in _FORMS[1:])]
        for line in lines
    ]
    quantized = export.get("quantization", {})
    forms = [(name.upper(), quantized[name]) for name in ("int8", "int4") if name in quantized]
    forms += [(f"{name.upper()} of native", found) for name, found in quantized.get("native", {}).items()]
    losses = [
        (
            name,
            f"perplexity × {found['perplexity_ratio']:.4f}, KL divergence of the next token {found['kl_mean']:.4f} nats on "
            f"average and {found['kl_p99']:.4f} at the 99th percentile",
        )
        for name, found in forms
    ]
    note = f"On {export['rows']:,} rows. Agreement: how often the likeliest next token is the checkpoint's."
    return [section("Exports", note, table(head, rows) + word_table(losses))]
