"""Analyse a translator's errors."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deploykit.bootstrap import Measure
from deploykit.data.reading import Reading
from deploykit.data.sample import evenly
from deploykit.inspection.drift import drift
from deploykit.inspection.robustness import MOST_ROWS, Noisy, robustness
from deploykit.inspection.rows import read_columns, texts_against
from deploykit.inspection.slices import Members, by_value, common_slices, sliced
from deploykit.inspection.worst_rows import worst_rows
from deploykit.runtime.generation import Generation
from deploykit.tasks.protocol import Evaluation, Progress
from deploykit.tasks.translation.evaluate import evaluation, translate_rows, translated_rows
from deploykit.tasks.translation.metrics import measure_of, placeholders, sentence_chrf
from deploykit.tasks.translation.noise import noisy_source
from deploykit.tasks.translation.predictor import TextTranslator
from deploykit.tasks.translation.rows import Pair
from deploykit.tasks.translation.source_prefix import cut_code
from deploykit.tasks.types import ReportOptions


def report(
    translator: TextTranslator,
    source: str,
    *,
    split: str,
    reading: Reading,
    columns: Mapping[str, Any],
    generation: Generation | None,
    options: ReportOptions,
    progress: Progress,
) -> tuple[Evaluation, dict[str, Any]]:
    """Measure, and return the analysis: slices, robustness and worst rows; with ``options.against`` drift.

    Raises DataError for a column to slice by that the rows do not have.
    """
    task = translator.task
    rows = translated_rows(
        source, task, source_column=columns.get("source_column"), target_column=columns.get("target_column"),
        reading=reading, split=split,
    )  # fmt: skip
    reading.stop_at(rows.problems)
    values_of = read_columns(
        source, options.slices, reading=reading, split=split
    )  # so that errors in the options show before the work
    pairs, translated, refused = translate_rows(translator, rows.pairs, generation, scored=True, progress=progress)
    values = values_of([pair.origin for pair in pairs])
    hypotheses, references = [one.text for one in translated], [pair.target for pair in pairs]

    def measure(inside: NDArray[np.bool_]) -> Measure:
        some = np.flatnonzero(inside)
        return measure_of([hypotheses[i] for i in some], [references[i] for i in some], task.target)

    def slices() -> Iterator[Members]:
        yield from common_slices([pair.source for pair in pairs], values, options.seen)
        codes = [cut_code(pair.source, task)[0].strip() for pair in pairs]
        if any(codes):
            yield from by_value("target language", codes)
        yield "placeholders: yes", np.array([bool(placeholders(pair.source)) for pair in pairs])
        yield "cut off at the longest length: yes", np.array([one.finish == "length" for one in translated])

    def noisy(rewrite: Noisy) -> Mapping[str, Any]:
        sources = [dataclasses.replace(pairs[i], source=noisy_source(pairs[i].source, rewrite)) for i in some]
        own, answers, _ = translate_rows(translator, sources, generation, scored=False)
        return evaluation(task, own, [one.text for one in answers], ()).metrics

    some = evenly(range(len(pairs)), MOST_ROWS)
    clean = evaluation(task, [pairs[i] for i in some], [hypotheses[i] for i in some], ()).metrics
    evaluated = evaluation(task, pairs, hypotheses, (*rows.problems, *refused))
    score = np.array([one.score for one in translated])
    record: dict[str, Any] = {
        "metrics": evaluated.metrics,
        "rows": evaluated.rows,
        "slices": sliced(measure, len(pairs), slices(), ("chrf", "bleu")),
        "robustness": robustness(clean, noisy, ("chrf", "bleu")),
        "worst": worst_rows(
            [pair.origin for pair in pairs],
            [pair.source for pair in pairs],
            references,
            hypotheses,
            {"chrf": sentence_chrf(hypotheses, references), "score": score},
        ),
    }
    if options.against is not None:
        texts = texts_against(task, options.against, reading=reading, columns=columns, measured=len(pairs))
        new, found, _ = translate_rows(
            translator, [Pair(text, "", options.against) for text in texts], generation, scored=True
        )
        record["drift"] = drift(
            [pair.source for pair in pairs],
            [pair.source for pair in new],
            {
                "tokens of a text": ([one.source_tokens for one in translated], [one.source_tokens for one in found]),
                "tokens of a translation": (
                    [one.target_tokens for one in translated],
                    [one.target_tokens for one in found],
                ),
                "score": (score, [one.score for one in found]),
            },
        )
    return evaluated, record
