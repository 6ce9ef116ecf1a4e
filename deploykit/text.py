"""Normalize text in the same way for training and for serving."""

from __future__ import annotations

import re
import unicodedata

MAX_TEXT_CHARS = 1_000_000
"""Longer texts are refused: no model reads them, and tokenizing them would delay other requests."""

_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
_SURROGATE = re.compile(r"[\ud800-\udfff]")

_SHOWS_NOTHING = frozenset("\u034f\u115f\u1160\u17b4\u17b5\u180b\u180c\u180d\u2800\u3164\uffa0")
"""Joiners, fillers and blank patterns that are letters, marks or symbols to Unicode; variation selectors come beside them."""


def is_blank(text: str) -> bool:
    """Return whether a text shows nothing: white space, control and format characters (U+200B, U+FEFF, U+00AD) alone."""
    return all(
        character.isspace()
        or unicodedata.category(character) in ("Cc", "Cf")
        or character in _SHOWS_NOTHING
        or "\ufe00" <= character <= "\ufe0f"
        for character in text
    )


def without_surrogates(text: str) -> str:
    """Replace lone surrogates, which no UTF-8 holds and no tokenizer takes, by U+FFFD; the length stays."""
    return _SURROGATE.sub("\ufffd", text)


def printable(text: str) -> str:
    """Replace control characters by spaces and lone surrogates by U+FFFD, one for one: places stay what they are."""
    return without_surrogates(_CONTROL.sub(" ", text))


def normalize(text: str) -> str:
    """Return the text in NFC; control characters become spaces, lone surrogates U+FFFD; outer white space is removed."""
    if text.isascii() and text.isprintable():
        return text.strip()
    return unicodedata.normalize("NFC", printable(text)).strip()
