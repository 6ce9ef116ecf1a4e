"""Read texts from any file: find their columns, and yield one row at a time."""

from __future__ import annotations

import contextlib
import datetime
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

from deploykit.data.open_text import ROW_ENDS, plain_suffix, read_lines
from deploykit.data.read import read_records
from deploykit.data.reading import AS_FOUND, Reading
from deploykit.data.record import Record, malformed
from deploykit.errors import DataError
from deploykit.text import normalize

TEXT_COLUMNS = ("text", "sentence", "content", "message", "review", "tweet", "comment", "body", "title")

LABEL_COLUMNS = (
    "label",
    "labels",
    "sentiment",
    "category",
    "class",
    "target",
    "topic",
    "rating",
    "stars",
    "intent",
)
# JSON rows may omit keys, so look at several rows to find the columns.
_ROWS_FOR_COLUMNS = 100


@dataclass(frozen=True)
class TextRow:
    """A text to predict; None with a ``problem`` if the row has no text. An empty text is a text."""

    origin: str
    text: str | None
    problem: str | None


def read_texts(
    source: str,
    columns: Sequence[str] | None = None,
    separator: str = " ",
    *,
    reading: Reading = AS_FOUND,
    split: str = "train",
) -> Iterator[TextRow]:
    """Stream the normalized texts of ``source``, or of a .txt file with one text per line.

    Every row is yielded, so that answers can be matched to rows. Raises like ``load_examples``.
    """
    if is_text_file(source):
        for origin, line in text_lines(source, reading):
            yield _text_row(origin, line)
        return
    records, names = peek(read_records(source, reading, split=split), source)
    if columns:
        require_columns(columns, names, source, "--text-column")
    used = tuple(columns or ()) or (detect_text_column(names, (), source),)
    for found in records:
        record = without_dates(found, used, reading)
        if record.problem:
            yield TextRow(record.origin, None, record.problem)
        else:
            text = joined(record, used, separator)
            problem = composite_problem(record, used)
            yield TextRow(record.origin, None, problem) if problem else _text_row(record.origin, text)


def is_text_file(source: str) -> bool:
    """Return whether ``source`` is a .txt file, compressed or not, which has a text on each line."""
    return plain_suffix(Path(source)) == ".txt"


def text_lines(source: str, reading: Reading = AS_FOUND) -> Iterator[tuple[str, str]]:
    """Yield the lines of a text file without their ends, each after its name in messages: ("notes.txt:1", "…").

    Raises UsageError for an option of ``reading`` that is for tables.
    """
    reading.allow(source)
    name = normalize(Path(source).name)
    for number, line in enumerate(read_lines(Path(source), reading.encoding, newline=ROW_ENDS), start=1):
        yield f"{name}:{number}", line.rstrip("\r\n")


def trained_columns(
    source: str, given: Sequence[str], trained: Sequence[str], reading: Reading = AS_FOUND
) -> tuple[str, ...]:
    """Return the columns ``given``; else those the model was ``trained`` on, if the source has them; else none, to detect.

    Only the head of the source is read.
    """
    if given:
        return tuple(given)
    try:
        next(iter(read_texts(source, trained, reading=reading)), None)
    except DataError:
        return ()
    return tuple(trained)


def row_columns(source: str, reading: Reading) -> Iterator[Mapping[str, object]]:
    """Yield the columns of each row that ``read_texts`` yields; for a .txt file, only the text."""
    if is_text_file(source):
        yield from ({"text": line} for _, line in text_lines(source, reading))
    else:
        yield from (record.values for record in read_records(source, reading))


def peek(records: Iterator[Record], source: str) -> tuple[Iterator[Record], list[str]]:
    """Return the records again, and the columns that the first ones have."""
    head = list(itertools.islice(records, _ROWS_FOR_COLUMNS))
    if not head:
        raise DataError(f"{source}: has no rows", "give a file with rows")
    names = list(dict.fromkeys(name for record in head for name in record.values))
    if not names:
        raise DataError(f"{source}: {head[0].problem or 'its rows have no columns'}", "give rows with a text")
    return itertools.chain(head, records), names


def require_columns(given: Sequence[str], names: Sequence[str], source: str, option: str) -> None:
    for name in given:
        if name not in names:
            raise DataError(f"{source}: has no column {name!r}; {listed(names)}", f"give {option} one of these")


def detect_text_column(names: Sequence[str], labels: Sequence[str], source: str) -> str:
    """Choose the column with a usual name, or the only one apart from the ``labels``. Raises DataError if there is none."""
    rest = [n for n in names if n not in labels]
    found = first_usual(TEXT_COLUMNS, rest)
    if found is None and (len(names) <= 2 or len(labels) > 1):
        others = labels or [n for n in (first_usual(LABEL_COLUMNS, names),) if n]
        rest = [n for n in names if n not in others]
        found = rest[0] if len(rest) == 1 and (others or len(names) == 1) else None
    if found is None:
        remedy = "give --text-column, or --no-header if the first line is a row"
        raise DataError(f"{source}: no column is recognized as the text; {listed(names)}", remedy)
    return found


def first_usual(usual: Sequence[str], names: Sequence[str]) -> str | None:
    by_lower = {name.lower(): name for name in reversed(names)}
    return next((by_lower[name] for name in usual if name in by_lower), None)


def listed(names: Sequence[str]) -> str:
    return f"its columns are {', '.join(map(repr, names))}"


def _text_row(origin: str, text: str | None) -> TextRow:
    if text is None:
        return TextRow(origin, None, "the text is missing")
    return TextRow(origin, normalize(text), None)


def joined(record: Record, columns: Sequence[str], separator: str) -> str | None:
    """Return the texts of ``columns`` as one; None if all are missing, or one is not a text."""
    if any(is_composite(record.values.get(column)) for column in columns):
        return None
    present = [text for column in columns if (text := scalar(record.values.get(column))) is not None]
    return separator.join(text for text in present if text.strip()) if present else None


def composite_problem(record: Record, columns: Iterable[str]) -> str:
    """Return which of ``columns`` contains several values; "" if none does."""
    for name in columns:
        if is_composite(value := record.values.get(name)):
            return f"{name!r} holds {'an object' if isinstance(value, Mapping) else 'a list'}, not a text"
    return ""


def is_composite(value: object) -> bool:
    """Return whether a cell contains several values, and so is not a text."""
    return isinstance(value, list | tuple | Mapping)


def scalar(value: object) -> str | None:
    """Return a cell as text; None for a missing or composite value."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, bytes):
        with contextlib.suppress(UnicodeDecodeError):
            return value.decode()
        return None
    if isinstance(value, Decimal) and value.is_finite():
        return str(int(value)) if value == value.to_integral_value() else str(value.normalize())
    if isinstance(value, float) and value == value and abs(value) != math.inf:
        # pandas stores a column of integers with gaps as float.
        return str(int(value)) if value.is_integer() else str(value)
    return None


def without_dates(record: Record, columns: Iterable[str], reading: Reading) -> Record:
    """Return ``record``, malformed if one of ``columns`` holds a date, a time or a duration: they have no one spelling.

    Raises DataError unless ``reading`` skips malformed rows.
    """
    for name in columns:
        if kind := date_kind(record.values.get(name)):
            error = DataError(
                f"{record.origin}: {name!r} holds {kind}, not a text",
                "format the column as text, or use --on-error skip",
            )
            return malformed(record.origin, error, reading, named=record.origin)
    return record


def date_kind(value: object) -> str:
    """Return what a cell of a date, a time or a duration is; "" for another cell. Spreadsheets and Parquet have such types."""
    if isinstance(value, datetime.date):  # also one with a time
        return "a date"
    return {datetime.time: "a time", datetime.timedelta: "a duration"}.get(type(value), "")


def unanswered(texts: Sequence[str | None], problem: DataError) -> list[tuple[str, str | None]]:
    """Return texts without right answers. Raises ``problem`` when there is no text."""
    rows: list[tuple[str, str | None]] = [(text, None) for text in texts if text]
    if not rows:
        raise problem from None
    return rows
