"""Read the entries of gettext catalogs: .po, .pot and .mo.

Format: GNU gettext manual, "The Format of PO Files" and "The Format of GNU MO Files".
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from deploykit.data.open_text import read_lines
from deploykit.data.packages import import_data_package
from deploykit.errors import DataError
from deploykit.tasks.translation.languages import parse_language
from deploykit.tasks.translation.pairs import RawPair
from deploykit.text import normalize

CATALOGS = (".po", ".pot", ".mo")

# polib drops the first and the last character of a string without checking that they are quotes.
_STRING_LINE = re.compile(
    r'(?:\#~\s*)?(?:(?:msgctxt|msgid|msgid_plural|msgstr(?:\[[0-9]+\])?)\s*)?"(?:[^"\\]|\\.)*"', re.DOTALL
)
_LINE_OF_ERROR = re.compile(r"\(line ([0-9]+)\)")


def read_catalog(path: Path, target: str, encoding: str | None = None) -> Iterator[RawPair]:
    """Yield entries with their translations, each plural form as its own pair; a missing translation is None.

    ``msgid_plural`` is paired with every form but the first, or with the only form of a language that has one.
    Fuzzy and obsolete entries are yielded as ``unusable``. The msgid is assumed to be in the source language.

    Raises:
        DataError: the catalog is malformed, or its header names another language than ``target``. Names file and line.
        MissingDependencyError: polib is not installed.
    """
    catalog = _parsed(path, encoding)
    language = catalog.metadata.get("Language", "").strip()
    if language and parse_language(language).base != parse_language(target).base:
        raise DataError(
            f"{path}: its header says that it translates to {language!r}, the target is {target!r}",
            f"give a catalog of {target!r}, or correct --target-lang or the header's Language",
        )
    for entry, origin in _entries(path, catalog):
        unusable: Literal["fuzzy", "obsolete"] | None = None
        if entry.obsolete:
            unusable = "obsolete"
        elif "fuzzy" in entry.flags:
            unusable = "fuzzy"
        for source, translation in _texts(entry):
            yield RawPair(source, translation or None, origin, unusable)


def read_catalog_sources(path: Path, encoding: str | None = None) -> Iterator[tuple[str, str]]:
    """Yield origin and text of each msgid and msgid_plural that is not obsolete. Raises as ``read_catalog``."""
    for entry, origin in _entries(path, _parsed(path, encoding)):
        if not entry.obsolete:
            yield origin, entry.msgid
            if entry.msgid_plural:
                yield origin, entry.msgid_plural


def _texts(entry: Any) -> Iterator[tuple[str, str]]:
    if not entry.msgid_plural:
        yield entry.msgid, entry.msgstr
        return
    forms: Mapping[int, str] = entry.msgstr_plural or {0: ""}
    for number, form in sorted(forms.items()):
        yield entry.msgid if number == 0 and len(forms) > 1 else entry.msgid_plural, form


def _entries(path: Path, catalog: Any) -> Iterator[tuple[Any, str]]:
    name = normalize(path.name)
    for number, entry in enumerate(catalog, start=1):
        # A .mo file has no lines, so entries are numbered instead.
        yield entry, f"{name}:{getattr(entry, 'linenum', None) or number}"


def _parsed(path: Path, encoding: str | None) -> Any:
    polib = import_data_package("polib")
    if not path.is_file():
        raise DataError(f"{path}: no such file", "check the path")
    try:
        if path.suffix.lower() == ".mo":
            return polib.mofile(str(path), encoding=encoding)
        used = encoding or polib.detect_encoding(str(path))
        _check_lines(path, used)
        return polib.pofile(str(path), encoding=used)
    except (OSError, ValueError, struct.error, IndexError, OverflowError) as error:
        line = _LINE_OF_ERROR.search(str(error))
        where = f"line {line[1]} is malformed" if line else f"is malformed: {error}"
        raise DataError(
            f"{path}: {where}", "correct it (msgfmt --check names every error), or compile it again"
        ) from None


def _check_lines(path: Path, encoding: str) -> None:
    for number, line in enumerate(read_lines(path, encoding), start=1):
        line = line.strip()
        if not line or (line.startswith("#") and not line.startswith("#~")) or line.startswith("#~|") or line == "#~":
            continue
        if not _STRING_LINE.fullmatch(line):
            raise DataError(
                f"{path}: line {number} is malformed: no keyword and a string in double quotes",
                'close every string, and write a quote inside a string as \\"',
            )
