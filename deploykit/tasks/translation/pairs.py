"""What a row of parallel text is, before and after cleaning."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from deploykit.text import normalize

_BREAKS = re.compile(r"[ \t\n\r\u2028\u2029]+")


@dataclass(frozen=True)
class RawPair:
    """A row as read; None is a missing text.

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
    """Where source and target stand: a table's columns, else the names that the kind of source has for them."""

    source: str
    target: str


def one_line(text: str) -> str:
    """``normalize`` the text and make spaces of its line ends and tabs; other white space stays as it is."""
    text = normalize(text)
    if text.isprintable():
        return text
    return _BREAKS.sub(lambda found: found[0] if found[0].isprintable() else " ", text).strip()
