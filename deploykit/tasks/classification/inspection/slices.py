"""Slices of a classifier's rows, worst first."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deploykit.inspection.slices import Members, common_slices, sliced
from deploykit.tasks.classification.facts import Classification
from deploykit.tasks.classification.resampling import measure_of
from deploykit.tasks.classification.rows import Example, label_parts


def sliced_metrics(
    task: Classification,
    examples: Sequence[Example],
    truth: NDArray[Any],
    scores: NDArray[np.float32],
    columns: Mapping[str, Sequence[str]],
    seen: Collection[str] | None = None,
) -> list[dict[str, Any]]:
    """Return metrics of the common slices and of each label; see ``sliced``."""

    def slices() -> Iterator[Members]:
        yield from common_slices([e.asked for e in examples], columns, seen)
        if not task.regression:
            labels = [label_parts(e.label, multi_label=task.multi_label) for e in examples]
            for label in task.labels:
                yield f"label: {label}", np.array([label in names for names in labels])

    names = ("rmse", "mae") if task.regression else ("accuracy", "macro_f1")
    return sliced(lambda inside: measure_of(task, truth[inside], scores[inside]), len(truth), slices(), names)
