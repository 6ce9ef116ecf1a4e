"""Compare a classifier's answers for the groups of a column: demographic parity and equalized odds, as fairlearn defines them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deploykit.bootstrap import Measure, intervals
from deploykit.inspection.slices import FEW, by_value
from deploykit.tasks.classification.facts import Classification
from deploykit.tasks.classification.metrics import decided, ratio


def group_gaps(
    task: Classification, truth: NDArray[Any], scores: NDArray[np.float32], columns: Mapping[str, Sequence[str]]
) -> list[dict[str, Any]]:
    """Return for each column and label: ``rates``, the share of each group's rows that get the label; ``demographic_parity``,
    the largest difference of these between two groups; ``equalized_odds``, that of the shares among the rows whose label it
    is, or among the others, whichever is larger (Hardt et al., 2016); and their ``intervals``.

    Groups of fewer than 10 rows are left out. Of two labels, only the second is reported: the first has the same gaps.
    """
    answers, _, _ = decided(task, truth, scores)
    labels = task.labels if task.multi_label or len(task.labels) != 2 else task.labels[1:]
    found = []
    for column, values in columns.items():
        groups = {name: inside for name, inside in by_value(column, values) if inside.sum() >= FEW}
        if len(groups) < 2:
            continue
        members = np.stack(list(groups.values()), axis=1).astype(float)
        for label in labels:
            at = task.labels.index(label)
            given, true = answers[:, at].astype(float), truth[:, at].astype(float)
            measure = _measure(members, given, true)
            whole = measure(np.ones(len(truth)))
            rates = members.T @ given / members.sum(axis=0)
            found.append(
                {
                    "column": column,
                    "label": label,
                    "rates": dict(zip(groups, rates.tolist())),
                    **{name: float(value) for name, value in whole.items()},
                    "intervals": intervals(measure, len(truth)),
                }
            )
    return sorted(found, key=lambda one: -max(one["demographic_parity"], one["equalized_odds"]))


def _measure(members: NDArray[np.float64], given: NDArray[np.float64], true: NDArray[np.float64]) -> Measure:
    """Return the gaps as functions of the rows' weights; ``members`` is [rows, groups], the others are [rows]."""

    def gap(weights: NDArray[np.float64], among: NDArray[np.float64]) -> Any:
        inside = members * among[:, None]
        rates = ratio(weights @ (inside * given[:, None]), weights @ inside)
        return rates.max(axis=-1) - rates.min(axis=-1)

    def measure(weights: NDArray[np.float64]) -> dict[str, Any]:
        return {
            "demographic_parity": gap(weights, np.ones_like(true)),
            "equalized_odds": np.maximum(gap(weights, true), gap(weights, 1 - true)),
        }

    return measure
