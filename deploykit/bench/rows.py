"""The texts that a bench asks with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from deploykit.artifacts import MANIFEST, load_manifest
from deploykit.data.classification import read_texts
from deploykit.data.translation import read_sources
from deploykit.errors import DataError
from deploykit.evaluate import labelled_rows, translated_rows
from deploykit.predictor import open_predictor
from deploykit.tasks import Classification, Task, Translation

Row = tuple[str, str | None]
"""A text and its right answer: labels, or a translation."""


def task_of(target: str, *, url: str) -> Task:
    """What ``target``, any of the models to be measured, does: which columns and answers to expect."""
    if (Path(target) / MANIFEST).exists():
        return load_manifest(Path(target), verify=False).task
    predictor = open_predictor(target, url=url)
    predictor.close()
    return predictor.task


def read_rows(
    source: str,
    task: Task,
    *,
    text_columns: Sequence[str] = (),
    label_column: str | None = None,
    source_column: str | None = None,
    target_column: str | None = None,
    encoding: str | None = None,
    most: int,
    seed: int,
) -> tuple[list[str], list[str] | None]:
    """At most ``most`` texts, drawn by ``seed``, and their right answers, or None where the source has none.

    ``text_columns`` and ``label_column`` are for a classifier, ``source_column`` and ``target_column``
    for a translator.
    """
    if isinstance(task, Translation):
        rows = _to_translate(source, task, source_column, target_column, encoding)
    else:
        rows = _to_classify(source, task, text_columns, label_column, encoding)
    order = np.random.default_rng(seed).permutation(len(rows))[:most]
    drawn = [rows[i] for i in order]
    truth = [answer for _, answer in drawn if answer is not None]
    return [text for text, _ in drawn], truth if truth else None


def _to_classify(
    source: str, task: Classification, text_columns: Sequence[str], label_column: str | None, encoding: str | None
) -> list[Row]:
    try:
        rows = labelled_rows(source, task, text_columns=text_columns, label_column=label_column, encoding=encoding)
        return [(e.text, e.label) for e in rows.examples]
    except DataError as no_labels:
        if label_column is not None:
            raise
        texts = read_texts(source, text_columns or None, task.text_separator, encoding=encoding)
        return _unanswered([row.text for row in texts], no_labels)


def _to_translate(
    source: str, task: Translation, source_column: str | None, target_column: str | None, encoding: str | None
) -> list[Row]:
    try:
        rows = translated_rows(
            source, task, source_column=source_column, target_column=target_column, encoding=encoding
        )
        return [(pair.source, pair.target) for pair in rows.pairs]
    except DataError as no_references:
        if target_column is not None:
            raise
        texts = read_sources(
            source, column=source_column, source=task.source, prefer=task.source_column, encoding=encoding
        )
        return _unanswered([row.text for row in texts], no_references)


def _unanswered(texts: Sequence[str | None], problem: DataError) -> list[Row]:
    rows: list[Row] = [(text, None) for text in texts if text]
    if not rows:
        raise problem from None
    return rows
