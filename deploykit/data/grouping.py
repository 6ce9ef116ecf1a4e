"""Recognize texts that are equal or nearly equal, so that a split keeps them together."""

from __future__ import annotations

import re
import unicodedata


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
