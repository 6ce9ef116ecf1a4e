"""Bookkeeping of a decode model's rows; the rows in use are always the first ones."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


def power_of_two(n: int, least: int = 1) -> int:
    """Return the smallest power of two that is at least ``n`` and ``least``. Buffers double, because growing means
    copying.
    """
    return max(least, 1 << (n - 1).bit_length())


def without(rows: int, gone: Ints) -> tuple[Ints, Ints, Ints]:
    """Compute how to close the gaps when ``gone`` of ``rows`` rows are removed: the last rows move into their places.

    Returns the former number of each remaining row, the gaps, and the rows that fill them.
    """
    left = rows - len(gone)
    order = np.arange(left)
    leaving = np.zeros(rows, bool)
    leaving[gone] = True
    holes = np.flatnonzero(leaving[:left])
    movers = left + np.flatnonzero(~leaving[left:])
    order[holes] = movers
    return order, holes, movers
