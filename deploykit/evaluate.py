"""Measure any predictor on labelled rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from deploykit.data.classification import Columns, Example, check_labels, load_examples
from deploykit.data.translation import Pair, PairColumns, load_pairs, one_line
from deploykit.errors import DataError
from deploykit.metrics import classification_metrics, translation_metrics
from deploykit.predictor import TextClassifier, TextTranslator
from deploykit.runtime.text import normalize
from deploykit.tasks import Classification, Generation, Translation

_CHUNK = 1024
_TRANSLATED_AT_A_TIME = 256


@dataclass(frozen=True)
class LabelledRows:
    """Rows to measure on: as they are, duplicates included. ``skipped`` rows had no text or no label."""

    examples: list[Example]
    skipped: int


@dataclass(frozen=True)
class Evaluation:
    """``metrics`` as ``classification_metrics`` or ``translation_metrics`` gives them, over ``rows`` rows."""

    metrics: dict[str, Any]
    rows: int
    skipped: int


def labelled_rows(
    source: str,
    task: Classification,
    *,
    text_columns: Sequence[str] = (),
    label_column: str | None = None,
    encoding: str | None = None,
    split: str = "test",
) -> LabelledRows:
    """Read rows whose labels the model knows.

    Columns not given are those that the model was trained on where the source has them, and
    otherwise detected. Raises DataError for a label never seen in training, or no usable row.
    """
    raw, _ = load_examples(
        source,
        text_columns=text_columns,
        label_column=label_column,
        prefer=Columns(task.text_columns, task.label_column),
        separator=task.text_separator,
        multi_label=task.multi_label,
        encoding=encoding,
        split=split,
    )
    examples = [
        Example(text, row.label, row.origin)
        for row in raw
        if row.text is not None
        and row.label is not None
        and (row.label or task.multi_label)
        and (text := normalize(row.text))
    ]
    if not examples:
        raise DataError(f"{source}: no row has both a text and a label", "give a file of labelled rows")
    check_labels(examples, task.labels, source, multi_label=task.multi_label)
    return LabelledRows(examples, len(raw) - len(examples))


def evaluate(
    predictor: TextClassifier, rows: LabelledRows, *, progress: Callable[[int, int], None] = lambda done, of: None
) -> Evaluation:
    """Answer every row and compare. ``progress`` is called with (rows done, rows in all)."""
    examples = rows.examples
    scores = []
    for start in range(0, len(examples), _CHUNK):
        scores.append(predictor.scores([e.text for e in examples[start : start + _CHUNK]]))
        progress(min(start + _CHUNK, len(examples)), len(examples))
    truth = predictor.task.targets([e.label for e in examples])
    metrics = classification_metrics(predictor.task, truth, np.concatenate(scores))
    return Evaluation(metrics, len(examples), rows.skipped)


@dataclass(frozen=True)
class TranslatedRows:
    """Pairs to measure on: as they are, duplicates included. ``skipped`` rows lacked a side."""

    pairs: list[Pair]
    skipped: int


def translated_rows(
    source: str,
    task: Translation,
    *,
    source_column: str | None = None,
    target_column: str | None = None,
    encoding: str | None = None,
    split: str = "test",
) -> TranslatedRows:
    """Read pairs in the task's languages. Raises DataError when no row has both sides."""
    raw, _ = load_pairs(
        source,
        source=task.source,
        target=task.target,
        source_column=source_column,
        target_column=target_column,
        prefer=PairColumns(task.source_column, task.target_column),
        encoding=encoding,
        split=split,
    )
    pairs = [
        Pair(text, reference, row.origin)
        for row in raw
        if not row.unusable and (text := one_line(row.source or "")) and (reference := one_line(row.target or ""))
    ]
    if not pairs:
        raise DataError(f"{source}: no row has both a text and its translation", "give a file of translated rows")
    return TranslatedRows(pairs, len(raw) - len(pairs))


def evaluate_translator(
    translator: TextTranslator,
    rows: TranslatedRows,
    generation: Generation | None = None,
    *,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> Evaluation:
    """Translate every row and compare. ``progress`` is called with (rows done, rows in all)."""
    pairs = rows.pairs
    hypotheses: list[str] = []
    for start in range(0, len(pairs), _TRANSLATED_AT_A_TIME):
        part = [pair.source for pair in pairs[start : start + _TRANSLATED_AT_A_TIME]]
        hypotheses += [translated.text for translated in translator.translate(part, generation)]
        progress(len(hypotheses), len(pairs))
    metrics = translation_metrics(hypotheses, [pair.target for pair in pairs], [pair.source for pair in pairs])
    return Evaluation(metrics, len(pairs), rows.skipped)
