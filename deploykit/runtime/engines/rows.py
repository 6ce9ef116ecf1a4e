"""Rows of a decode model, of which those in use are always the first ones."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


def power_of_two(n: int, least: int = 1) -> int:
    """The least one that is ``n`` or more, and ``least`` or more: what grows is doubled, for growing means copying."""
    return max(least, 1 << (n - 1).bit_length())


def without(rows: int, gone: Ints) -> tuple[Ints, Ints, Ints]:
    """How ``rows`` close up when some are ``gone``: the last ones move into their places.

    Returns, for each row left, its number before; the places filled; and the rows that fill them.
    """
    left = rows - len(gone)
    order = np.arange(left)
    leaving = np.zeros(rows, bool)
    leaving[gone] = True
    holes = np.flatnonzero(leaving[:left])
    movers = left + np.flatnonzero(~leaving[left:])
    order[holes] = movers
    return order, holes, movers
