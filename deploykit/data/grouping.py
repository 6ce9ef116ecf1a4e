"""Recognize texts that are equal or nearly equal, so that a split keeps them together."""

from __future__ import annotations

import re
import unicodedata

from deploykit.errors import UsageError


def duplicate_key(text: str) -> str:
    """Return a key that is equal for texts that differ only in case, white space or Unicode form."""
    return unicodedata.normalize("NFC", " ".join(text.casefold().split()))


_ADDRESSES = re.compile(r"^\s*rt\s*@\w+:?|(?<!\w)@\w+|https?://\S+|www\.\S+")


_NOT_LETTER_OR_DIGIT = re.compile(r"[\W_]+")


def group_key(text: str) -> str:
    """Return a key that is equal for near duplicates: letters and digits, without a retweet mark, @mentions and URLs.

    A text without letters and digits (emoji, for example) is its own key.
    """
    key = duplicate_key(text)
    return _NOT_LETTER_OR_DIGIT.sub("", _ADDRESSES.sub(" ", key)) or key


def require_shares(validation: float, test: float) -> None:
    """Raise UsageError for shares of the rows that are negative, or leave nothing to train on."""
    if not (min(validation, test) >= 0 and validation + test < 1):  # "not (…)" catches NaN too
        raise UsageError(
            f"validation {validation:g} and test {test:g} do not leave rows for training",
            "let --validation-fraction and --test-fraction add up to less than 1",
        )
