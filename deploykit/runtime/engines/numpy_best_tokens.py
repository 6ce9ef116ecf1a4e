"""Find the most probable tokens of each row with numpy, so that a GPU machine needs no ONNX Runtime."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_BLOCK = 128

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]


class NumpyBestTokens:
    """``BestTokens`` in numpy. ``logits`` are float32 [rows, vocabulary]; no row depends on another."""

    def __call__(self, logits: Floats, k: int) -> tuple[Floats, Ints]:
        """Return the ``k`` best tokens of each row: log-probabilities, descending, and ids, [rows, k] each.

        Of equal logits the lower id comes first.
        """
        columns = np.stack([_best(row, k) for row in logits])
        values: Floats = np.take_along_axis(logits, columns, axis=1) - self.log_sums(logits)[:, None]
        return values, columns

    def of(self, logits: Floats, tokens: Ints) -> Floats:
        """Return the log-probability of one token of each row: float32 [rows]."""
        gained: Floats = logits[np.arange(len(logits)), tokens] - self.log_sums(logits)
        return gained

    def log_sums(self, logits: Floats) -> Floats:
        """Return log(sum(exp(logits))) of each row, float32 [rows]: logits minus it are log-probabilities."""
        sums = np.empty(len(logits), np.float32)
        for i, row in enumerate(logits):  # row by row: one row fits the CPU's cache, all rows do not
            highest = row.max()
            sums[i] = highest + np.log(np.exp(row - highest).sum())
        return sums


def _best(row: Floats, k: int) -> Ints:
    """Return the columns of the ``k`` highest values.

    They are in the ``k`` blocks with the highest maxima, or in the remainder after the last block.
    """
    columns: Ints = np.arange(len(row))
    blocks = len(row) // _BLOCK
    if blocks > k:
        highest = row[: blocks * _BLOCK].reshape(blocks, _BLOCK).max(axis=1)
        chosen = np.sort(np.argsort(-highest, kind="stable")[:k])
        within = columns[: blocks * _BLOCK].reshape(blocks, _BLOCK)[chosen].ravel()
        columns = np.concatenate([within, columns[blocks * _BLOCK :]])
    best: Ints = columns[np.argsort(-row[columns], kind="stable")[:k]]
    return best
