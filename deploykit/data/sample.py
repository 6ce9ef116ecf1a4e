"""Take a sample of rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

Row = TypeVar("Row")


def evenly(rows: Sequence[Row], count: int) -> list[Row]:
    """Return ``count`` rows, evenly spaced: files are often sorted, so the first rows may be all of one kind."""
    return [rows[i] for i in np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(int)]
