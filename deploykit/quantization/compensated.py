"""Round weights to INT8 such that a layer's errors compensate each other on real inputs (GPTQ; Frantar et al., ICLR 2023).

Weights of a linear layer are rounded input by input; what rounding changes in the layer's output is made up for by the
weights of the inputs that are still to be rounded.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]

_DAMPING = 0.01
"""Share of the mean square of the inputs that is added to each: few rows do not show all of them."""
_AT_ONCE = 32


class Rounding:
    """Rounds the layers whose inputs are known, each once: a search writes many files of one model."""

    def __init__(self) -> None:
        self._factors: Mapping[str, Array] = {}
        self._done: dict[tuple[str, int], tuple[NDArray[np.int8], Array]] = {}

    @property
    def compensates(self) -> bool:
        return bool(self._factors)

    def learn(self, factors: Mapping[str, Array]) -> None:
        """Take the ``factor`` of the inputs of each linear layer, by its name."""
        self._factors = factors

    def rounded(self, name: str, weight: Array, block: int) -> tuple[NDArray[np.int8], Array] | None:
        """Return ``compensated`` weights of the layer ``name``; None if its inputs are not known."""
        factor = self._factors.get(name)
        if factor is None:
            return None
        if (name, block) not in self._done:
            self._done[name, block] = compensated(weight, factor, block)
        return self._done[name, block]


def factor(squares: Array) -> Array:
    """Return what ``compensated`` needs of a layer's inputs: from the sums of their products, [in, in], the upper
    Cholesky factor of the inverse."""
    exact = squares.astype(np.float64)
    diagonal = np.diagonal(squares)
    unused = diagonal == 0
    exact[unused, unused] = 1
    exact[np.diag_indices_from(exact)] += _DAMPING * diagonal.mean()
    upper: Array = np.linalg.cholesky(np.linalg.inv(exact)).T.astype(np.float32)
    return upper


def compensated(weight: Array, factor: Array, block: int) -> tuple[NDArray[np.int8], Array]:
    """Round ``weight`` [in, out] to INT8 with a scale for each ``block`` inputs of an output.

    Returns values [in, out] and scales [in / block, out].
    """
    left = weight.astype(np.float32)
    inputs = len(left)
    values, scales = np.empty(left.shape, np.int8), []
    for start in range(0, inputs, block):
        stop = min(start + block, inputs)
        scale = np.abs(left[start:stop]).max(0) / np.float32(127)
        scale = np.where(scale == 0, np.float32(1), scale)
        scales.append(scale)
        for begin in range(start, stop, _AT_ONCE):
            end = min(begin + _AT_ONCE, stop)
            part, inner = left[begin:end], factor[begin:end, begin:end]
            errors = np.empty_like(part)
            for i, row in enumerate(part):
                values[begin + i] = np.clip(np.rint(row / scale), -127, 127)
                errors[i] = (row - values[begin + i] * scale) / inner[i, i]
                part[i + 1 :] -= inner[i, i + 1 :, None] * errors[i]
            left[end:] -= factor[begin:end, end:].T @ errors
    return values, np.stack(scales)
