"""The texts that a bench asks with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from deploykit.artifacts import MANIFEST, load_manifest
from deploykit.data.classification import read_texts
from deploykit.errors import DataError
from deploykit.evaluate import labelled_rows
from deploykit.predictor import open_predictor


def read_rows(
    source: str,
    target: str,
    *,
    url: str,
    text_columns: Sequence[str],
    label_column: str | None,
    encoding: str | None,
    most: int,
    seed: int,
) -> tuple[list[str], list[str] | None]:
    """At most ``most`` texts, drawn by ``seed``, and their labels, or None where the source has none.

    ``target``, any of the models to be measured, says which columns and labels to expect.
    """
    if (Path(target) / MANIFEST).exists():
        task = load_manifest(Path(target), verify=False).task
    else:
        predictor = open_predictor(target, url=url)
        task = predictor.task
        predictor.close()
    try:
        rows = labelled_rows(source, task, text_columns=text_columns, label_column=label_column, encoding=encoding)
        pairs: list[tuple[str, str | None]] = [(e.text, e.label) for e in rows.examples]
    except DataError as no_labels:
        if label_column is not None:
            raise
        texts = read_texts(source, text_columns or None, task.text_separator, encoding=encoding)
        pairs = [(row.text, None) for row in texts if row.text]
        if not pairs:
            raise no_labels from None
    order = np.random.default_rng(seed).permutation(len(pairs))[:most]
    drawn = [pairs[i] for i in order]
    labels = [label for _, label in drawn if label is not None]
    return [text for text, _ in drawn], labels if labels else None
