"""Metrics of slices of the rows, worst first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deploykit.data.grouping import duplicate_key
from deploykit.errors import DataError
from deploykit.tasks.classification.facts import Classification
from deploykit.tasks.classification.resampling import metrics_with_intervals
from deploykit.tasks.classification.rows import Example, label_parts

_FEW = 10
"""Slices with fewer rows say nothing, and are left out."""
_MOST_VALUES = 30
_NUMERIC_VALUES = 10

Members = tuple[str, NDArray[np.bool_]]


def sliced_metrics(
    task: Classification,
    examples: Sequence[Example],
    truth: NDArray[Any],
    scores: NDArray[np.float32],
    columns: Mapping[str, Sequence[str]],
) -> list[dict[str, Any]]:
    """Return metrics with intervals of each slice of at least 10 rows, worst accuracy (or largest RMSE) first.

    The slices are the values of ``columns`` (a value for each row), thirds by length, labels, and duplicates. A slice
    is ``worse`` if its interval does not reach that of all rows.
    """
    metric = "rmse" if task.regression else "accuracy"
    sign = -1 if task.regression else 1
    whole = metrics_with_intervals(task, truth, scores)["intervals"][metric]
    found = []
    for name, inside in _slices(task, examples, columns):
        if inside.sum() < _FEW or inside.all():
            continue
        metrics = metrics_with_intervals(task, truth[inside], scores[inside])
        own = metrics["intervals"][metric]
        names = ("rmse", "mae") if task.regression else ("accuracy", "macro_f1")
        found.append(
            {
                "slice": name,
                "rows": int(inside.sum()),
                **{key: metrics[key] for key in names},
                "intervals": {key: metrics["intervals"][key] for key in names},
                "worse": own[0] > whole[1] if task.regression else own[1] < whole[0],
            }
        )
    return sorted(found, key=lambda one: sign * one[metric])


def _slices(
    task: Classification, examples: Sequence[Example], columns: Mapping[str, Sequence[str]]
) -> Iterator[Members]:
    for column, values in columns.items():
        yield from _by_value(column, values)
    yield from _by_number("words", [len(f"{e.text} {e.text_pair or ''}".split()) for e in examples], 3)
    if not task.regression:
        labels = [label_parts(e.label, multi_label=task.multi_label) for e in examples]
        for label in task.labels:
            yield f"label: {label}", np.array([label in names for names in labels])
    times = Counter(duplicate_key(e.asked) for e in examples)
    yield "duplicates: yes", np.array([times[duplicate_key(e.asked)] > 1 for e in examples])


def _by_value(column: str, values: Sequence[str]) -> Iterator[Members]:
    different = Counter(values)
    try:
        numbers = [float(value) for value in values]
    except ValueError:
        numbers = []
    if len(different) > _NUMERIC_VALUES and numbers:
        yield from _by_number(column, numbers, 4)
        return
    for value, _ in different.most_common(_MOST_VALUES):
        yield f"{column}: {value or '(none)'}", np.array([other == value for other in values])


def _by_number(name: str, values: Sequence[float], parts: int) -> Iterator[Members]:
    numbers = np.asarray(values, float)
    edges = np.unique(np.quantile(numbers, np.linspace(0, 1, parts + 1)[1:-1]))
    part = np.searchsorted(edges, numbers, side="left")
    for i in range(len(edges) + 1):
        inside = part == i
        if inside.any():
            yield f"{name}: {numbers[inside].min():g} to {numbers[inside].max():g}", inside


def check_columns(names: Sequence[str], known: Sequence[str], source: str) -> None:
    """Raise DataError for a column that the rows do not have."""
    for name in names:
        if name not in known:
            raise DataError(f"{source}: has no column {name!r} to slice by", f"give one of: {', '.join(known)}")
