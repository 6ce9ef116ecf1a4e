"""Normalize text in the same way for training and for serving."""

from __future__ import annotations

import re
import unicodedata

MAX_TEXT_CHARS = 1_000_000
"""Longer texts are refused: no model reads them, and tokenizing them would delay other requests."""

_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
_SURROGATE = re.compile(r"[\ud800-\udfff]")


def normalize(text: str) -> str:
    """Return the text in NFC; control characters become spaces, lone surrogates U+FFFD; outer white space is removed."""
    if text.isascii() and text.isprintable():
        return text.strip()
    text = _SURROGATE.sub("\ufffd", text)
    text = _CONTROL.sub(" ", text)
    return unicodedata.normalize("NFC", text).strip()
