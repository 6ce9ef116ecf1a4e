"""Read pairs of texts from files: find their columns, and yield one row at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from deploykit.data.read import read_records
from deploykit.data.reading import AS_FOUND, Reading
from deploykit.data.record import Record
from deploykit.data.texts import (
    TextRow,
    detect_text_column,
    is_composite,
    peek,
    read_texts,
    require_columns,
    scalar,
    without_dates,
)
from deploykit.errors import DataError, UsageError
from deploykit.tasks.classification.facts import Classification, as_text, from_text

PAIR_COLUMNS = (
    ("text", "text_pair"),
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("query", "passage"),
)
"""Usual names of the two columns of a pair: of the splits that a run keeps, and of public data sets."""


def detect_pair(names: Sequence[str]) -> tuple[str, ...]:
    """Return the columns of a pair that have usual names, in any case; () where there are none."""
    by_lower = {name.lower(): name for name in reversed(names)}
    found: tuple[str, ...] = next((pair for pair in PAIR_COLUMNS if set(pair) <= set(by_lower)), ())
    return tuple(by_lower[name] for name in found)


def check_columns(facts: Classification, given: Sequence[str]) -> None:
    """Raise UsageError for more text columns than the model reads; columns that are joined may be any number."""
    if not facts.pair and len(facts.text_columns) == 1 < len(given):
        raise UsageError(
            f"the model reads one text, and {len(given)} text columns are given",
            "give one --text-column; if the checkpoint reads pairs and deploykit did not train it, export it with "
            "deploykit export --text-column A --text-column B",
        )


def paired(record: Record, columns: Sequence[str]) -> tuple[str, str] | None:
    """Return a record's pair: of two columns, a missing cell is empty; of one, the pair that it holds as JSON.

    None if every cell is missing. Raises DataError naming the record whose cell is not a pair.
    """
    value = record.values.get(columns[0])
    cells: Sequence[object] = [record.values.get(column) for column in columns]
    if len(columns) == 1 and isinstance(value, list):
        cells = value
    elif len(columns) == 1 and isinstance(value, str) and value.strip():
        try:
            return from_text(value)
        except DataError as error:
            raise DataError(
                f"{record.origin}: column {columns[0]!r}: {error.message}",
                "name the two columns: --text-column A --text-column B",
            ) from None
    if any(map(is_composite, cells)):
        raise DataError(f"{record.origin}: a text of the pair is a list or an object", "give each text as a string")
    texts = [scalar(cell) for cell in cells]
    if all(text is None for text in texts):
        return None
    if len(texts) != 2:
        raise DataError(
            f"{record.origin}: {len(texts)} texts, and the model reads pairs",
            "give --text-column for each text of a pair",
        )
    return texts[0] or "", texts[1] or ""


def read_pairs(source: str, columns: Sequence[str], reading: Reading = AS_FOUND) -> Iterator[TextRow]:
    """Stream the pairs of ``source`` as ``read_texts`` does texts, each as one (``as_text``).

    A .txt file has a pair as JSON in each line. Raises DataError for an unreadable source or a column that it lacks.
    """
    records: Iterable[Record]
    if Path(source).suffix.lower() == ".txt":
        records = (Record(row.origin, {"text": row.text}) for row in read_texts(source, reading=reading))
        used: tuple[str, ...] = ("text",)
    else:
        records, names = peek(read_records(source, reading), source)
        require_columns(columns, names, source, "--text-column")
        used = tuple(columns) or detect_pair(names) or (detect_text_column(names, (), source),)
    for found in records:
        record = without_dates(found, used, reading)
        try:
            pair = paired(record, used)
        except DataError as error:
            yield TextRow(record.origin, None, error.message)
            continue
        if pair is None:
            yield TextRow(record.origin, None, record.problem or "the text is missing")
        else:
            yield TextRow(record.origin, as_text(*pair), None)
