"""Replace words of a text by synonyms from a list."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from random import Random

from deploykit.errors import DataError, first_line

Synonyms = Mapping[str, Sequence[str]]
"""A word in lower case -> its synonyms."""

_WORD = re.compile(r"\w+(?:['’-]\w+)*")
_SHORTEST = 4
"""Least letters of a word that a thesaurus replaces, because it lists "a" as the ångström and "I" as iodine."""


def words_of(text: str) -> list[re.Match[str]]:
    """Return the words of a text, without marks around them."""
    return list(_WORD.finditer(text))


def with_words(text: str, replaced: Iterable[tuple[re.Match[str], str]]) -> str:
    """Return a text with some words replaced, in the case of the original words."""
    parts, end = [], 0
    for word, other in replaced:
        parts += [text[end : word.start()], _in_case(word.group(), other)]
        end = word.end()
    return "".join(parts) + text[end:]


def replace_words(text: str, rate: float, random: Random, synonyms: Synonyms) -> str:
    """Replace this share of the words that have synonyms."""
    return with_words(
        text,
        (
            (word, random.choice(known))
            for word in words_of(text)
            if (known := synonyms.get(word.group().lower())) and random.random() < rate
        ),
    )


def read_synonyms(path: Path) -> Synonyms:
    """Read a list, or a thesaurus of MyThes, whose name ends in .dat. Raises DataError.

    A line of a list has interchangeable words, separated by commas. From a thesaurus, only the synonyms of a
    word's first meaning are used, without the words that it marks as more general, antonyms and so on.
    """
    try:
        data = path.read_bytes()
        if path.suffix != ".dat":
            found = _listed(data.decode("utf-8-sig").splitlines())
        else:  # its first line names the encoding
            encoding = data.partition(b"\n")[0].decode("ascii").strip()
            found = dict(_thesaurus(data.decode(encoding).splitlines()[1:]))
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}", "check the path") from error
    except (LookupError, ValueError) as error:
        raise DataError(
            f"{path}: is not a list of synonyms: {first_line(error)}",
            "give lines of interchangeable words, separated by commas, or a MyThes thesaurus (.dat)",
        ) from error
    if not found:
        raise DataError(f"{path}: has no synonyms", "give interchangeable words, separated by commas")
    return found


def _listed(lines: Iterable[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in lines:
        words = [word.strip() for word in line.split(",") if word.strip()]
        for word in words:
            found.setdefault(word.lower(), []).extend(other for other in words if other != word)
    return {word: others for word, others in found.items() if others}


def _thesaurus(lines: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    entry = 0
    while entry < len(lines):
        word, _, meanings = lines[entry].rpartition("|")
        first = lines[entry + 1].split("|")[1:]
        others = [other for other in first if "(" not in other and other.lower() != word.lower()]
        if len(word) >= _SHORTEST and others:
            yield word.lower(), others
        entry += 1 + int(meanings)


def _in_case(word: str, other: str) -> str:
    if word.isupper() and len(word) > 1:
        return other.upper()
    return other[:1].upper() + other[1:] if word[:1].isupper() else other
