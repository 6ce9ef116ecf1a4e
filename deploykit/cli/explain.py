from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import click

from deploykit.attribution.words import Unit
from deploykit.cli_parts.asked_texts import failed_rows
from deploykit.cli_parts.command import Result, deploykit_command, option, progress_bar
from deploykit.cli_parts.shared_options import (
    FORCE,
    check_page,
    column_options,
    columns_for,
    model_options,
    reading_options,
)
from deploykit.data.reading import Reading
from deploykit.errors import DataError, UsageError


@deploykit_command(
    help="Show which words the answers of TARGET come from, for TEXTS (to question answering: questions; to a language model: prompts) or the rows of a file. TARGET is a checkpoint, an export, a packaged model, or a served model's name."
)
@click.argument("target")
@click.argument("texts", nargs=-1)
@click.option("--text-pair", "pairs", multiple=True, help="Second text of a pair; one for each text.")
@click.option("--context", type=click.Path(path_type=Path), help="File of the text.")
@click.option(
    "--rows",
    "source",
    help="Rows to explain together: the words that push most towards each label, or towards the answers.",
)
@option("--answer", aliases=["--label"], help="Explain this answer: a label, words of the context, a translation, or a text (default: "
        "the model's own).")  # fmt: skip
@click.option(
    "--method",
    type=click.Choice(["auto", "gradients", "occlusion"]),
    default="auto",
    show_default=True,
    help="Integrated gradients (a checkpoint that classifies or generates text), or the effect of removing each word (any "
    "model). auto: gradients for a classifier's checkpoint.",
)
@click.option("--unit", type=click.Choice(["word", "sentence"]), default="word", show_default=True, help="Weight words, or whole sentences, "
              "which is faster for long texts.")  # fmt: skip
@click.option("--output", type=click.Path(path_type=Path), help="HTML page to write.")
@reading_options(on_error="skip")
@column_options(inputs_only=True)
@option("--num-prompts", "max_rows", type=click.IntRange(1), default=200, show_default=True,
        help="Number of rows to use, at most.")  # fmt: skip
@FORCE
@model_options
def command(
    *,
    target: str,
    texts: tuple[str, ...],
    pairs: tuple[str, ...],
    context: Path | None,
    source: str | None,
    answer: str | None,
    method: str,
    unit: Unit,
    output: Path | None,
    columns: dict[str, Any],
    reading: Reading,
    max_rows: int,
    force: bool,
    **where: Any,
) -> Result:
    if bool(texts) == bool(source):
        raise UsageError("give texts, or --rows", f'deploykit explain {target} "some text"')
    if source is None and any(columns.values()):
        raise UsageError("column options are for --rows", "leave them out, or give --rows")
    if pairs and len(pairs) != len(texts):
        raise UsageError(f"there are {len(texts)} texts and {len(pairs)} of --text-pair", "give as many of each")
    if context is not None and (source or pairs):
        raise UsageError("--context is for questions among the arguments", "leave it out")
    check_page("--output", output)
    if output is not None and output.exists() and not force:
        raise UsageError(f"{output}: already exists", "choose another --output, or pass --force to replace it")

    from deploykit.attribution.explain import mean_deletion, words_of_answers
    from deploykit.bench.rows import read_rows
    from deploykit.data.open_text import read_text
    from deploykit.report.explanation_page import answer_lines, explanation_lines, write_explanations
    from deploykit.report.svg import require_matplotlib
    from deploykit.stages.explain import explain_texts
    from deploykit.tasks.opening import open_predictor
    from deploykit.tasks.registry import task_of

    if output is not None:
        require_matplotlib()
    refused: list[str] = []
    predictor = open_predictor(target, **where)
    try:
        task, facts = task_of(predictor.task), predictor.task
        if source is not None:
            own = columns_for(task, columns)
            asked, _ = read_rows(source, facts, columns=own, reading=reading, most=max_rows, seed=0)
        elif context is not None:
            reading.allow(str(context))
            about = read_text(context, reading.encoding)
            asked = [task.as_text(facts, text, about) for text in texts]
        else:
            asked = [task.as_text(facts, *pair) for pair in zip(texts, pairs)] if pairs else list(texts)
        with progress_bar("texts") as progress:
            found = explain_texts(
                predictor, asked, method=method, answer=answer, unit=unit, refused=refused if source else None,
                progress=progress,
            )  # fmt: skip
    finally:
        predictor.close()
    reading.stop_at(refused)
    if source and not found:
        raise DataError(f"{source}: the model refuses all rows, the first one: {refused[0]}", "give other rows")
    lines = [*answer_lines(found)] if source else [line for one in found for line in explanation_lines(one)]
    record: dict[str, Any] = {"target": target, "explanations": [dataclasses.asdict(one) for one in found]}
    if source:
        words = words_of_answers(found)
        record["words"] = {
            answer: [{"word": word, "weight": weight, "occurrences": count} for word, weight, count in of_answer]
            for answer, of_answer in words.items()
        }
    if (deletion := mean_deletion(found)) is not None:
        record["deletion"] = {**dataclasses.asdict(deletion), "gain": deletion.gain}
        half = f"{100 * deletion.shares[-1]:.0f} %"
        lines.append(
            f"check by deletion: {deletion.top[0]:.4f}; without {half} of the words {deletion.top[-1]:.4f} (top words), "
            f"{deletion.random[-1]:.4f} (random words)"
        )
    if output is not None:
        write_explanations(target, found, output, by_answer=source is not None)
        lines.append(f"{output}: written")
    text = "\n".join(lines)  # click removes colours where no terminal is
    return (
        {**record, "output": None if output is None else str(output)},
        click.unstyle(text) if os.environ.get("NO_COLOR") else text,
        failed_rows(refused),
    )
