"""Bootstrap 95 % intervals of metrics over rows (Efron and Tibshirani, 1993), and of the difference of two models.

scipy.stats.bootstrap resamples the rows themselves. As functions of the rows' weights, most metrics of all resamples are one
matrix product; and serving machines have no scipy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Measure = Callable[[NDArray[np.float64]], Mapping[str, Any]]
"""Returns metrics by name for weights of the rows: a number for weights [rows], an array for weights [resamples, rows]."""

_RESAMPLES = 1000
_AT_ONCE = 20_000_000  # weights in memory


def intervals(measure: Measure, rows: int) -> dict[str, list[float]]:
    """Return a low and a high value for each metric."""
    return {name: _interval(values) for name, values in _drawn(rows, measure).items()}


def sacrebleu_score(
    metric: Any, answers: Sequence[str], references: Sequence[str]
) -> Callable[[NDArray[np.float64]], Any]:
    """Return the score of a ``metric`` of sacrebleu as a function of the rows' weights.

    It adds up the counts of matches of each row, as sacrebleu's own bootstrap does.
    """
    counts = np.array(metric._extract_corpus_statistics(list(answers), [list(references)]))

    def score(weights: NDArray[np.float64]) -> Any:
        sums = (np.atleast_2d(weights) @ counts).astype(np.int64).tolist()
        scores = np.array([metric._compute_score_from_stats(of_rows).score for of_rows in sums])
        return scores if weights.ndim > 1 else scores[0]

    return score


def differences(measure: Measure, baseline: Measure, rows: int) -> dict[str, dict[str, Any]]:
    """Compare two models on the same ``rows``, resampled together (paired bootstrap).

    Returns for each metric that both have the ``difference`` to the baseline, its ``interval``, and whether it is
    ``beyond_noise``: whether 0 lies outside of the interval.
    """
    whole, other = measure(np.ones(rows)), baseline(np.ones(rows))
    names = [name for name in whole if name in other]
    drawn = _drawn(rows, lambda w: _minus(measure(w), baseline(w), names))
    found = {}
    for name in names:
        low, high = _interval(drawn[name])
        difference = _round(whole[name] - other[name])
        found[name] = {"difference": difference, "interval": [low, high], "beyond_noise": low > 0 or high < 0}
    return found


def _minus(metrics: Mapping[str, Any], others: Mapping[str, Any], names: list[str]) -> dict[str, Any]:
    return {name: metrics[name] - others[name] for name in names}


def _drawn(rows: int, measure: Measure) -> dict[str, NDArray[np.float64]]:
    parts = [measure(weights) for weights in _weights(rows)]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _weights(rows: int) -> Iterator[NDArray[np.float64]]:
    """Yield how often each row is drawn, [resamples, rows], a part of the resamples at a time."""
    random, left = np.random.default_rng(0), _RESAMPLES
    while left:
        count = min(left, max(1, _AT_ONCE // rows))
        yield random.multinomial(rows, [1 / rows] * rows, count).astype(float)
        left -= count


def _interval(values: NDArray[np.float64]) -> list[float]:
    return [_round(value) for value in np.percentile(values, (2.5, 97.5))]


def _round(value: Any) -> float:
    return round(float(value), 6)
