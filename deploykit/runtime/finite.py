"""Refuse the answer to a text for which a model computed NaN or infinity."""

from __future__ import annotations

from deploykit.errors import DataError


class NoNumberError(DataError):
    """The error of a text whose logits are not finite."""

    def __init__(self) -> None:
        super().__init__(
            "the model computed no number for this text (NaN or infinity)",
            "export the model in a precision with a wider range, or train it again",
        )
