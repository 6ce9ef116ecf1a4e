"""Noisy copies of rows: of the training rows to learn from, of the measured ones to see what noise costs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from random import Random
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deploykit.data.noise import NOISES, parse_noise
from deploykit.tasks.classification.predictor import TextClassifier
from deploykit.tasks.classification.resampling import metrics_with_intervals
from deploykit.tasks.classification.rows import Example

_MEASURED = {"typos": 0.2, "case": 1.0, "punctuation": 0.3}
"""Noises that a report measures, with their rates."""


def augmented(rows: Sequence[Example], noises: Sequence[str], seed: int) -> list[Example]:
    """Return a copy of each row with each of ``noises`` ("typos=0.1"), where that changes it.

    The origin of a copy names the row and the noise: "tweets.csv:17 with typos".
    """
    found = []
    for name, rate in map(parse_noise, noises):
        random = Random(f"{seed} {name}")
        for row in rows:
            copy = _noisy(row, name, rate, random)
            if (copy.text, copy.text_pair) != (row.text, row.text_pair):
                found.append(dataclasses.replace(copy, origin=f"{row.origin} with {name}"))
    return found


def robustness(
    predictor: TextClassifier, rows: Sequence[Example], truth: NDArray[Any], scores: NDArray[np.float32]
) -> list[dict[str, Any]]:
    """Measure rows as they are and with typos, in the other case, and with unseen punctuation, with intervals."""
    names = ("rmse", "mae") if predictor.task.regression else ("accuracy", "macro_f1")
    found = []
    for name in ("clean", *_MEASURED):
        if name != "clean":
            random = Random(name)
            scores = predictor.scores([_noisy(row, name, _MEASURED[name], random).asked for row in rows])
        metrics = metrics_with_intervals(predictor.task, truth, scores)
        intervals = {metric: metrics["intervals"][metric] for metric in names}
        found.append({"noise": name, **{metric: metrics[metric] for metric in names}, "intervals": intervals})
    return found


def _noisy(row: Example, name: str, rate: float, random: Random) -> Example:
    noise = NOISES[name]
    pair = None if row.text_pair is None else noise(row.text_pair, rate, random)
    return dataclasses.replace(row, text=noise(row.text, rate, random), text_pair=pair)
