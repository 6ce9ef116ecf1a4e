"""Find the rows that a model answers worst."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

MOST = 30
_SHOWN = 300


def worst_rows(
    origins: Sequence[str],
    asked: Sequence[str],
    expected: Sequence[str],
    answers: Sequence[str],
    numbers: dict[str, NDArray[np.float64]],
) -> list[dict[str, Any]]:
    """Return the rows with the lowest first metric of ``numbers``, and among equal ones the highest last metric first: at most 30,
    and no row with a perfect first metric (1, or 100 for chrF)."""
    (metric, first), (_, last) = next(iter(numbers.items())), list(numbers.items())[-1]
    perfect = 100.0 if metric == "chrf" else 1.0
    order = [i for i in np.lexsort((-last, first)) if first[i] < perfect][:MOST]
    return [
        {
            "origin": origins[i],
            "asked": _short(asked[i]),
            "expected": _short(expected[i]),
            "answer": _short(answers[i]),
            **{name: round(float(values[i]), 6) for name, values in numbers.items()},
        }
        for i in order
    ]


def _short(text: str) -> str:
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "…"
