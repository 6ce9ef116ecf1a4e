"""Read the texts for a benchmark."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from deploykit.artifacts import MANIFEST, load_manifest
from deploykit.data.reading import AS_FOUND, Reading
from deploykit.tasks.opening import open_predictor
from deploykit.tasks.protocol import TaskFacts
from deploykit.tasks.registry import task_of


def facts_of(target: str, *, url: str) -> TaskFacts:
    """Return the task facts of ``target``, which say what columns and answers to expect."""
    if (Path(target) / MANIFEST).exists():
        return load_manifest(Path(target), verify=False).task
    predictor = open_predictor(target, url=url)
    predictor.close()
    return predictor.task


def read_rows(
    source: str, task: TaskFacts, *, columns: Mapping[str, Any] = {}, reading: Reading = AS_FOUND, most: int, seed: int
) -> tuple[list[str], list[str] | None]:
    """Return at most ``most`` texts, drawn by ``seed``, and their correct answers, or None if the source has none.

    ``columns`` are the column options, given or None.
    """
    rows = task_of(task).read_texts(source, task, reading=reading, columns=columns)
    order = np.random.default_rng(seed).permutation(len(rows))[:most]
    drawn = [rows[i] for i in order]
    truth = [answer for _, answer in drawn if answer is not None]
    return [text for text, _ in drawn], truth if truth else None
