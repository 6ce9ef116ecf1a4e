"""Stream the translation units of a TMX file.

TMX 1.4b: https://www.gala-global.org/tmx-14b. Only one unit is in memory at a time; translate-toolkit parses whole files.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.parsers import expat

from deploykit.errors import DataError, UsageError
from deploykit.tasks.translation.languages import distance
from deploykit.text import MAX_TEXT_CHARS

# Elements that hold code of the document's format (a tag, a field), not text.
_CODES = frozenset(("bpt", "ept", "it", "ph", "ut", "sub"))
_BLOCK = 1 << 16
_LANGUAGES_IN_MESSAGE = 20


@dataclass(frozen=True)
class Unit:
    """The texts of a ``<tu>`` in the requested languages, None for a missing one, and its line number.

    ``inline_codes``: whether inline codes were removed from one of these texts.
    """

    line: int
    texts: tuple[str | None, ...]
    inline_codes: bool = False


def read_tmx(path: Path, languages: Sequence[str], encoding: str | None = None) -> Iterator[Unit]:
    """Stream the units. Of variants of several regions, take the one closest to the requested language.

    Inline codes are removed. ``encoding`` overrides the file's declaration.

    Raises:
        DataError: not well-formed XML, not TMX, entities declared or undefined, no unit that has all ``languages``.
        UsageError: ``encoding`` is not known.
    """
    if encoding is not None:
        try:
            encoding = codecs.lookup(encoding).name.removesuffix("-sig")
        except LookupError:
            raise UsageError(
                f"--encoding {encoding!r} is not a known text encoding", "give one such as utf-8 or utf-16"
            ) from None
    reader = _UnitParser(path, languages, encoding)
    complete = False
    try:
        with path.open("rb") as file:
            last = False
            while not last:
                block = file.read(_BLOCK)
                last = not block
                reader.parser.Parse(block, last)
                for unit in reader.units:
                    complete = complete or None not in unit.texts
                    yield unit
                reader.units.clear()
    except expat.ExpatError as error:
        raise DataError(
            f"{path}: line {error.lineno} is not well-formed XML: {expat.ErrorString(error.code)}",
            "correct the file, or export it again",
        ) from None
    except (LookupError, ValueError) as error:  # an encoding that neither expat nor Python supports
        raise DataError(f"{path}: its encoding cannot be read: {error}", "save it as UTF-8") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}", "check the file") from error
    if not complete:
        has = ", ".join(map(repr, reader.seen)) or "none"
        raise DataError(
            f"{path}: no unit has text in {' and '.join(map(repr, languages))}; its languages are {has}",
            "give --source-lang and --target-lang of these",
        )


class _UnitParser:
    """A parser with the units that it has found and that were not yielded yet."""

    def __init__(self, path: Path, languages: Sequence[str], encoding: str | None) -> None:
        self.units: list[Unit] = []
        self.seen: dict[str, None] = {}
        self._path = path
        self._languages = languages
        self._line = 0
        self._inside = self._codes = 0
        self._variant = ""
        self._texts: dict[int, tuple[int, str, bool]] = {}
        self._has_codes = False
        self._segment: list[str] | None = None
        self._length = 0
        self.parser = expat.ParserCreate(encoding)
        self.parser.buffer_text = True
        self.parser.StartElementHandler = self._start
        self.parser.EndElementHandler = self._end
        self.parser.CharacterDataHandler = self._characters
        # Expat fetches no external entities; refuse internal ones too.
        self.parser.EntityDeclHandler = self._declared
        self.parser.SkippedEntityHandler = self._undefined

    def _start(self, tag: str, attributes: dict[str, str]) -> None:
        if not self._inside and tag != "tmx":
            raise DataError(f"{self._path}: is not TMX: it begins with <{tag}>", "give a file that begins with <tmx>")
        self._inside += 1
        if tag == "tu":
            self._line, self._texts = self.parser.CurrentLineNumber, {}
        elif tag == "tuv":
            # TMX 1.1 had no "xml:".
            self._variant = attributes.get("xml:lang") or attributes.get("lang") or ""
            if self._variant and len(self.seen) < _LANGUAGES_IN_MESSAGE:
                self.seen[self._variant] = None
        elif tag == "seg":
            self._segment, self._length, self._codes, self._has_codes = [], 0, 0, False
        elif tag in _CODES:
            self._codes += 1
            self._has_codes = True

    def _end(self, tag: str) -> None:
        self._inside -= 1
        if tag in _CODES:
            self._codes -= 1
        elif tag == "seg" and self._segment is not None:
            text, self._segment = "".join(self._segment), None
            for index, language in enumerate(self._languages):
                far = distance(language, self._variant)
                if far is not None and (index not in self._texts or far < self._texts[index][0]):
                    self._texts[index] = (far, text, self._has_codes)
        elif tag == "tu":
            found = [self._texts.get(index, (0, None, False)) for index in range(len(self._languages))]
            texts = tuple(text for _, text, _ in found)
            self.units.append(Unit(self._line, texts, any(codes for _, _, codes in found)))

    def _characters(self, data: str) -> None:
        # Keep no more than the longest accepted text: a longer one is refused anyway.
        if self._segment is not None and not self._codes and self._length <= MAX_TEXT_CHARS:
            self._segment.append(data)
            self._length += len(data)

    def _declared(self, name: str, *_: object) -> None:
        raise DataError(
            f"{self._path}: line {self.parser.CurrentLineNumber} declares the entity {name!r}, which is refused",
            "write the characters themselves, and remove the <!ENTITY> declarations",
        )

    def _undefined(self, name: str, is_parameter: bool) -> None:
        if not is_parameter:
            raise DataError(
                f"{self._path}: line {self.parser.CurrentLineNumber}: the entity &{name}; is not defined",
                "write the character itself",
            )
