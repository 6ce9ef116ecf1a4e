"""Round weights to INT8 or INT4 such that a layer's errors compensate each other on real inputs (GPTQ; Frantar et al., ICLR 2023).

Weights of a linear layer are rounded input by input. The change that rounding makes in the layer's output is compensated by the
weights of the inputs that have not been rounded yet. ONNX Runtime's GPTQ writes MatMulNBits, which only its own engine reads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]

_DAMPING = 0.01
"""Share of the mean square of the inputs that is added to each, because few rows do not activate all inputs."""
_AT_ONCE = 32


@dataclass(frozen=True)
class Levels:
    """The values that a block of weights can take: ``scale`` times a whole number from ``least`` to ``most``, plus ``minimum``.

    ``scale`` and ``minimum`` are the block's shape without its inputs, the first axis.
    """

    scale: Array
    minimum: Array
    least: int
    most: int

    def round(self, weights: Array) -> Array:
        """Return the whole numbers nearest to ``weights``, whose last axes are those of ``scale``."""
        safe = np.where(self.scale == 0, np.float32(1), self.scale)
        numbers: Array = np.clip(np.rint((weights - self.minimum) / safe), self.least, self.most)
        return numbers


Fit = Callable[[Array], Levels]
"""Chooses the levels of a block of weights [inputs, ...]."""


def int8_levels(block: Array) -> Levels:
    """Return levels that are symmetric about 0."""
    scale = np.abs(block).max(0) / np.float32(127)
    scale = np.where(scale == 0, np.float32(1), scale)
    return Levels(scale, np.zeros_like(scale), -127, 127)


@dataclass(frozen=True)
class Rounded:
    """Weights [in, out] as ``values`` from -127 to 127, with ``scales`` and ``minimums`` [blocks, out]; see ``Levels``."""

    values: NDArray[np.int8]
    scales: Array
    minimums: Array


class Rounding:
    """Rounds the layers with known inputs, each once, because a search writes many files of one model."""

    def __init__(self) -> None:
        self._factors: Mapping[str, Array] = {}
        self._done: dict[tuple[str, int, Fit], Rounded] = {}

    @property
    def compensates(self) -> bool:
        return bool(self._factors)

    def learn(self, factors: Mapping[str, Array]) -> None:
        """Store the ``factor`` of the inputs of each linear layer, by its name."""
        self._factors = factors

    def rounded(
        self, name: str, weight: Array, block: int, fit: Fit, changed: Callable[[Array], Array] = lambda factor: factor
    ) -> Rounded | None:
        """Return ``compensated`` weights of the layer ``name``; None if its inputs are not known. ``changed`` returns the factor
        of the inputs of ``weight`` from that of the layer's inputs."""
        factor = self._factors.get(name)
        if factor is None:
            return None
        key = (name, block, fit)
        if key not in self._done:
            self._done[key] = compensated(weight, changed(factor), block, fit)
        return self._done[key]


def factor(squares: Array) -> Array:
    """Return a factor of a layer's inputs for ``compensated``: from the sums of their products, [in, in], the upper
    Cholesky factor of the inverse."""
    exact = squares.astype(np.float64)
    diagonal = np.diagonal(squares)
    unused = diagonal == 0
    exact[unused, unused] = 1
    exact[np.diag_indices_from(exact)] += _DAMPING * diagonal.mean()
    upper: Array = np.linalg.cholesky(np.linalg.inv(exact)).T.astype(np.float32)
    return upper


def compensated(weight: Array, factor: Array, block: int, fit: Fit) -> Rounded:
    """Round ``weight`` [in, out], to the levels that ``fit`` chooses for each ``block`` inputs of an output."""
    left = weight.astype(np.float32)
    inputs = len(left)
    values, scales, minimums = np.empty(left.shape, np.int8), [], []
    for start in range(0, inputs, block):
        stop = min(start + block, inputs)
        levels = fit(left[start:stop])
        scales.append(levels.scale)
        minimums.append(levels.minimum)
        for begin in range(start, stop, _AT_ONCE):
            end = min(begin + _AT_ONCE, stop)
            part, inner = left[begin:end], factor[begin:end, begin:end]
            errors = np.empty_like(part)
            for i, row in enumerate(part):
                numbers = levels.round(row)
                values[begin + i] = numbers
                errors[i] = (row - numbers * levels.scale - levels.minimum) / inner[i, i]
                part[i + 1 :] -= inner[i, i + 1 :, None] * errors[i]
            left[end:] -= factor[begin:end, end:].T @ errors
    return Rounded(values, np.stack(scales), np.stack(minimums))
