"""Refuse the answer to a text for which a model computed NaN or infinity."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from deploykit.errors import DataError


class NoNumberError(DataError):
    """The error of a text whose logits are not finite."""

    def __init__(self) -> None:
        super().__init__(
            "the model computed no number for this text (NaN or infinity)",
            "export the model in a precision with a wider range, or train it again",
        )


def check_highest(logits: NDArray[np.float32]) -> None:
    """Raise NoNumberError if one of a token's logits, [vocabulary], is NaN, or the highest infinite. Others may be -inf."""
    if not math.isfinite(logits.max()):  # NaN if any is
        raise NoNumberError
