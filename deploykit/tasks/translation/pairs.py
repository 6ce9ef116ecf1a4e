"""Define a row of parallel text, before and after cleaning."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from deploykit.text import normalize

_BREAKS = re.compile(r"[ \t\n\r\u2028\u2029]+")


@dataclass(frozen=True)
class RawPair:
    """A row as read; a missing text is None.

    ``unusable``: a catalog's entry that is marked so. ``inline_codes``: whether reading left out codes of TMX that stood
    within a text, as a placeholder does. ``problem``: why the row is malformed; empty if it is not.
    """

    source: str | None
    target: str | None
    origin: str
    unusable: Literal["fuzzy", "obsolete"] | None = None
    inline_codes: bool = False
    problem: str = ""


@dataclass(frozen=True)
class Pair:
    """A usable row: two texts of one line each."""

    source: str
    target: str
    origin: str


@dataclass(frozen=True)
class PairColumns:
    """Names of the source and target columns of a table, or the equivalent of another file type."""

    source: str
    target: str


def one_line(text: str) -> str:
    """Normalize a text and replace its line ends and tabs with spaces; other white space stays."""
    text = normalize(text)
    if text.isprintable():
        return text
    return _BREAKS.sub(lambda found: found[0] if found[0].isprintable() else " ", text).strip()
