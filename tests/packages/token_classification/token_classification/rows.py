"""Read, clean and split rows of words and their labels."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from deploykit.data.grouping import group_key
from deploykit.data.open_text import read_lines
from deploykit.data.read import read_records
from deploykit.data.reading import Reading
from deploykit.data.texts import TextRow, first_usual, peek, read_texts, require_columns, scalar
from deploykit.errors import DataError
from deploykit.text import normalize
from token_classification.facts import OUTSIDE

CONLL = (".conll", ".bio", ".iob2")
"""Files with a word and its label on each line, and an empty line between rows."""
_WORDS = ("words", "tokens", "text", "sentence")
_LABELS = ("labels", "tags", "ner_tags", "label")


@dataclass(frozen=True)
class Columns:
    """The columns of words and labels, whose cells are lists or strings separated by white space."""

    words: str
    labels: str


@dataclass(frozen=True)
class RawExample:
    """A row as read; a missing part is None."""

    words: tuple[str, ...] | None
    labels: tuple[str, ...] | None
    origin: str


@dataclass(frozen=True)
class Example:
    """A usable row: ``words`` and ``labels`` are joined by spaces, and equal in number."""

    words: str
    labels: str
    origin: str


@dataclass(frozen=True)
class CleaningReport:
    """Counts of rows by what cleaning did to them."""

    rows_read: int
    missing: int
    unequal: int
    duplicates: int
    rows_kept: int

    def to_json(self) -> dict[str, int]:
        return dataclasses.asdict(self)

    def lines(self) -> list[str]:
        dropped = (
            (self.missing, "without words or without labels dropped"),
            (self.unequal, "with another number of labels than of words dropped"),
            (self.duplicates, "duplicates dropped (first kept)"),
        )
        lines = [f"  - {count:>8,} {what}" for count, what in dropped if count]
        return [f"{self.rows_read:,} rows read", *lines, f"{self.rows_kept:,} rows kept"]


def load_examples(
    source: str, words: str | None, labels: str | None, *, reading: Reading, split: str
) -> tuple[list[RawExample], Columns]:
    """Read every row of a CoNLL file, or of a source for ``read_records``. Raises DataError."""
    if Path(source).suffix.lower() in CONLL:
        return list(_conll(Path(source), reading)), Columns(words or _WORDS[0], labels or _LABELS[0])
    records, names = peek(read_records(source, reading, split=split), source)
    columns = Columns(
        _column(words, _WORDS, names, source, "--words-column"),
        _column(labels, _LABELS, names, source, "--label-column"),
    )
    rows = [
        RawExample(_parts(r.values.get(columns.words)), _parts(r.values.get(columns.labels)), r.origin) for r in records
    ]
    return rows, columns


def read_inputs(source: str, words: str | None, trained: str, reading: Reading) -> Iterator[TextRow]:
    """Stream the words of every row, joined by spaces; of a .txt file a line is a row."""
    if Path(source).suffix.lower() == ".txt":
        yield from read_texts(source, reading=reading)
    elif Path(source).suffix.lower() in CONLL:
        for row in _conll(Path(source), reading):
            yield TextRow(row.origin, " ".join(row.words or ()), None)
    else:
        records, names = peek(read_records(source, reading), source)
        column = _column(words, (trained, *_WORDS), names, source, "--words-column")
        for record in records:
            text = " ".join(_parts(record.values.get(column)) or ())
            yield TextRow(record.origin, text or None, None if text else "the text is missing")


def clean(raw: Sequence[RawExample]) -> tuple[list[Example], CleaningReport]:
    """Drop rows that lack words or labels or have unequal numbers of them, and duplicates."""
    missing = unequal = 0
    kept: dict[str, Example] = {}
    usable = 0
    for row in raw:
        if not row.words or not row.labels:
            missing += 1
        elif len(row.words) != len(row.labels):
            unequal += 1
        else:
            usable += 1
            example = Example(" ".join(row.words), " ".join(row.labels), row.origin)
            kept.setdefault(example.words, example)
    report = CleaningReport(len(raw), missing, unequal, usable - len(kept), len(kept))
    return list(kept.values()), report


def label_names(examples: Sequence[Example]) -> tuple[str, ...]:
    """Return every label that occurs, ``O`` first."""
    found = {label for example in examples for label in example.labels.split()}
    return (OUTSIDE, *sorted(found - {OUTSIDE}))


def check_labels(examples: Sequence[Example], known: Sequence[str], source: str) -> None:
    """Raise DataError naming the first row with a label that is not ``known``."""
    for example in examples:
        if unknown := set(example.labels.split()) - set(known):
            raise DataError(
                f"{source}: {example.origin} has the label {min(unknown)!r}, which no training row has",
                f"correct it; the labels are {', '.join(known)}",
            )


def split_rows(rows: Sequence[Example], *, validation: float, test: float, seed: int) -> list[list[Example]]:
    """Split into training, validation and test rows by a hash of their text, so that near duplicates stay together."""
    groups: dict[str, list[Example]] = {}
    for row in rows:
        groups.setdefault(group_key(row.words), []).append(row)
    order = sorted(groups, key=lambda key: hashlib.blake2b(f"{seed}\0{key}".encode()).digest())
    parts: list[list[Example]] = [[], [], []]
    for key in order:
        wanted = next((i for i, share in ((1, validation), (2, test)) if len(parts[i]) < share * len(rows)), 0)
        parts[wanted] += groups[key]
    if not parts[0] or (validation and not parts[1]) or (test and not parts[2]):
        raise DataError(f"{len(rows)} rows are too few to split", "give more rows, or --validation and --test")
    return parts


def _conll(path: Path, reading: Reading) -> Iterator[RawExample]:
    words: list[str] = []
    labels: list[str] = []
    start = 0
    for number, line in enumerate([*read_lines(path, reading.encoding), ""], start=1):
        cells = normalize(line).split()
        if cells and cells[0] != "-DOCSTART-":
            if len(cells) < 2:
                raise DataError(f"{path.name}:{number}: has a word without a label", "write: WORD LABEL")
            start = start or number
            words.append(cells[0])
            labels.append(cells[-1])
        elif words:
            yield RawExample(tuple(words), tuple(labels), f"{path.name}:{start}")
            words, labels, start = [], [], 0


def _column(given: str | None, usual: Sequence[str], names: Sequence[str], source: str, option: str) -> str:
    if given is not None:
        require_columns([given], names, source, option)
        return given
    found = first_usual(usual, names)
    if found is None:
        raise DataError(f"{source}: none of its columns {', '.join(names)} is recognized", f"give {option}")
    return found


def _parts(value: object) -> tuple[str, ...] | None:
    """Return a list's items, or a string's words; white space within an item becomes an underscore."""
    if isinstance(value, list):
        return tuple("_".join(normalize(scalar(item) or "").split()) for item in value)
    text = scalar(value)
    return None if text is None else tuple(normalize(text).split())
