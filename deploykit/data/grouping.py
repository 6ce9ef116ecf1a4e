"""Recognize texts that are the same, or nearly the same, so that a split does not tear them apart."""

from __future__ import annotations

import re
import unicodedata


def duplicate_key(text: str) -> str:
    """Equal for texts that differ only in case, white space or Unicode form."""
    return unicodedata.normalize("NFC", " ".join(text.casefold().split()))


_ADDRESSES = re.compile(r"^\s*rt\s*@\w+:?|(?<!\w)@\w+|https?://\S+|www\.\S+")


_NOT_LETTER_OR_DIGIT = re.compile(r"[\W_]+")


def group_key(text: str) -> str:
    """Letters and digits alone, without a retweet's mark, @mentions and URLs: equal for near duplicates.

    A text that has none of them (emoji, say) stands for itself.
    """
    key = duplicate_key(text)
    return _NOT_LETTER_OR_DIGIT.sub("", _ADDRESSES.sub(" ", key)) or key
