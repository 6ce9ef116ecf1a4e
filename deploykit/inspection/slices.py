"""Measure slices of the rows, worst first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deploykit.bootstrap import Measure, intervals
from deploykit.data.grouping import duplicate_key
from deploykit.metric_titles import lower_is_better

FEW = 10
"""Minimum rows of a slice: smaller slices say nothing, and are left out."""
_MOST_VALUES = 30
_NUMERIC_VALUES = 10

Members = tuple[str, NDArray[np.bool_]]


def sliced(
    measure_of: Callable[[NDArray[np.bool_]], Measure], rows: int, members: Iterable[Members], names: Sequence[str]
) -> list[dict[str, Any]]:
    """Return the metrics ``names``, with intervals, of each slice of at least 10 rows, worst by the first one first.

    ``measure_of`` returns the metrics of some rows. A slice is ``worse`` if its interval does not reach that of all rows.
    """
    metric = names[0]
    error = lower_is_better(metric)
    low, high = intervals(measure_of(np.ones(rows, bool)), rows)[metric]
    found = []
    for name, inside in members:
        count = int(inside.sum())
        if count < FEW or count == rows:
            continue
        measure = measure_of(inside)
        values, own = measure(np.ones(count)), intervals(measure, count)
        found.append(
            {
                "slice": name,
                "rows": count,
                **{key: float(values[key]) for key in names},
                "intervals": {key: own[key] for key in names},
                "worse": own[metric][0] > high if error else own[metric][1] < low,
            }
        )
    return sorted(found, key=lambda one: -one[metric] if error else one[metric])


def common_slices(
    texts: Sequence[str],
    columns: Mapping[str, Sequence[str]],
    seen: Collection[str] | None,
    passed: Sequence[str] | None = None,
) -> Iterator[Members]:
    """Yield the values of ``columns`` (a value for each row), thirds by length, duplicates among the rows, and rows whose
    texts the model has ``seen`` (duplicate keys) when it was trained. ``passed`` are the rows as stages pass them on, if that is
    not as ``texts``."""
    for column, values in columns.items():
        yield from by_value(column, values)
    yield from by_number("words", [len(text.split()) for text in texts], 3)
    keys = [duplicate_key(text) for text in passed or texts]
    times = Counter(keys)
    yield "duplicates: yes", np.array([times[key] > 1 for key in keys])
    if seen is not None:
        known = np.array([key in seen for key in keys])
        yield "seen in training: yes", known
        yield "seen in training: no", ~known


def by_value(column: str, values: Sequence[str]) -> Iterator[Members]:
    """Yield a slice for each of the 30 most frequent values, or quarters of many numbers."""
    different = Counter(values)
    try:
        numbers = [float(value) for value in values]
    except ValueError:
        numbers = []
    if len(different) > _NUMERIC_VALUES and numbers:
        yield from by_number(column, numbers, 4)
        return
    for value, _ in different.most_common(_MOST_VALUES):
        yield f"{column}: {value or '(none)'}", np.array([other == value for other in values])


def by_number(name: str, values: Sequence[float], parts: int) -> Iterator[Members]:
    """Yield slices of about equal numbers of rows."""
    numbers = np.asarray(values, float)
    edges = np.unique(np.quantile(numbers, np.linspace(0, 1, parts + 1)[1:-1]))
    part = np.searchsorted(edges, numbers, side="left")
    for i in range(len(edges) + 1):
        inside = part == i
        if inside.any():
            yield f"{name}: {numbers[inside].min():g} to {numbers[inside].max():g}", inside
