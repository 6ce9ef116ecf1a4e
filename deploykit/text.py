"""One normalization of text, the same in training and in serving, so that the model sees in
production what it was trained on."""

from __future__ import annotations

import re
import unicodedata

MAX_TEXT_CHARS = 1_000_000
"""A longer text is refused rather than tokenized: no model reads it, and it would hold up the others."""

_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
_SURROGATE = re.compile(r"[\ud800-\udfff]")


def without_surrogates(text: str) -> str:
    """Replace lone surrogates, which no UTF-8 holds and no tokenizer takes, by U+FFFD; the length stays."""
    return _SURROGATE.sub("\ufffd", text)


def normalize(text: str) -> str:
    """NFC; control characters become spaces, lone surrogates U+FFFD; outer white space goes."""
    if text.isascii() and text.isprintable():
        return text.strip()
    text = without_surrogates(text)
    text = _CONTROL.sub(" ", text)
    return unicodedata.normalize("NFC", text).strip()
