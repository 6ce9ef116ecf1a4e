"""Normalize text in the same way for training and for serving."""

from __future__ import annotations

import re
import unicodedata

MAX_TEXT_CHARS = 1_000_000
"""Maximum characters of a text: tokenizing a longer text would delay other requests, and no model reads all of it."""

_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
_SURROGATE = re.compile(r"[\ud800-\udfff]")

_SHOWS_NOTHING = frozenset("\u034f\u115f\u1160\u17b4\u17b5\u180b\u180c\u180d\u2800\u3164\uffa0")
"""Invisible joiners, fillers and blank patterns that Unicode classifies as letters, marks or symbols."""


def is_blank(text: str) -> bool:
    """Return whether a text has no visible character: only white space, control and format characters (U+200B,
    U+FEFF)."""
    return all(
        character.isspace()
        or unicodedata.category(character) in ("Cc", "Cf")
        or character in _SHOWS_NOTHING
        or "\ufe00" <= character <= "\ufe0f"
        for character in text
    )


def without_surrogates(text: str) -> str:
    """Replace lone surrogates, which UTF-8 and tokenizers cannot represent, by U+FFFD; the length stays."""
    return _SURROGATE.sub("\ufffd", text)


def printable(text: str) -> str:
    """Replace control characters by spaces and lone surrogates by U+FFFD, one for one, so that positions stay."""
    return without_surrogates(_CONTROL.sub(" ", text))


def normalize(text: str) -> str:
    """Return the text in NFC; control characters become spaces, lone surrogates U+FFFD; outer white space is
    removed."""
    if text.isascii() and text.isprintable():
        return text.strip()
    return unicodedata.normalize("NFC", printable(text)).strip()
