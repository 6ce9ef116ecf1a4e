"""Read delimited text (CSV, TSV): find the layout from the data, then stream the rows.

A quote may enclose a field (as in RFC 4180) or be an ordinary character (in many TSV files). If it is misread, one
quote swallows all rows up to the next one. So the whole file is scanned before the first row is returned. csv.Sniffer reads a
sample, and always takes quotes to enclose fields.
"""

from __future__ import annotations

import csv
import itertools
import re
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Literal

from deploykit.data.open_text import ROW_ENDS, plain_suffix, read_lines
from deploykit.data.reading import AS_FOUND, Reading
from deploykit.data.record import Record, malformed
from deploykit.errors import DataError
from deploykit.text import normalize

# Raise csv's limit of 131,072 characters per field, which is global to the process.
csv.field_size_limit(min(sys.maxsize, 2**31 - 1))

Quoting = Literal["minimal", "escaped", "none"]
"""The meaning of a quote: it encloses a field and "" is a quote inside; the same with \\" inside; or a plain character."""

_ESCAPE = re.compile(r'\\(["\\])')
_SEP_LINE = re.compile(r"sep=(.)", re.IGNORECASE)  # the first line that Excel's users write for a delimiter
_DELIMITERS = (";", "\t", "|")
_DELIMITER_NAMES = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "pipes"}
# A column with more distinct values cannot show whether a line is a separate row.
_MOST_VALUES = 1000


@dataclass(frozen=True)
class Layout:
    """The layout of a delimited file: how to read it, and what is unusual in it.

    ``above`` counts the lines before the first row, which is the ``header`` unless that is False. ``columns`` are the
    named ones; further cells are only counted in ``beyond``. ``spanning`` rows have a field of several lines; the first
    begins at line ``first_spanning``.
    """

    delimiter: str
    quoting: Quoting
    above: int
    columns: tuple[str, ...]
    header: bool = True
    unnamed: int = 0
    rows: int = 0
    spanning: int = 0
    first_spanning: int = 0
    repeated_headers: int = 0
    beyond: int = 0

    def lines(self) -> list[str]:
        """Return lines that describe what is unusual about the layout."""
        quotes = {
            "minimal": "",
            "escaped": r", quotes inside fields escaped as \"",
            "none": ", quotes are characters like others",
        }
        lines = []
        if self.delimiter != "," or self.quoting != "minimal":
            separated = _DELIMITER_NAMES.get(self.delimiter, repr(self.delimiter))
            lines.append(f"fields separated by {separated}{quotes[self.quoting]}")
        if not self.header:
            lines.append(f"no header; the columns are {', '.join(map(repr, self.columns))}")
        if self.spanning:
            lines.append(
                f"{self.spanning:,} rows have a field of several lines (the first at line {self.first_spanning:,})"
            )
        if self.repeated_headers:
            lines.append(f"{self.repeated_headers:,} repeated header lines dropped")
        if self.unnamed:
            lost = f"; {self.beyond:,} rows have a cell there, which is not read" if self.beyond else ""
            lines.append(f"{self.unnamed} columns without a name at the end{lost}")
        return lines


def read_delimited(path: Path, reading: Reading = AS_FOUND) -> Iterator[Record]:
    """Stream the rows of a delimited file. Raises DataError for a malformed row, naming its line."""
    layout = find_layout(path, reading)
    name = normalize(path.name)
    for start, row in _rows(path, reading.encoding, layout):
        if len(row) > len(layout.columns) + layout.unnamed:
            yield malformed(f"{name}:{start}", _too_many(path, start, row, layout), reading, named=path)
        else:
            yield Record(f"{name}:{start}", dict(itertools.zip_longest(layout.columns, row[: len(layout.columns)])))


def find_layout(path: Path, reading: Reading = AS_FOUND) -> Layout:
    """Find the parts of a delimited file's layout that ``reading`` does not specify, from all of its rows.

    Raises DataError for a file without a header, or a header that names a column twice; UsageError for column names
    that are not as many as the fields. Malformed rows are reported when they are read.
    """
    status = path.stat() if path.exists() else None
    return _find_layout(path, reading, (status.st_mtime_ns, status.st_size) if status else None)


@lru_cache(maxsize=64)
def _find_layout(path: Path, reading: Reading, version: object) -> Layout:
    encoding = reading.encoding
    every = enumerate(read_lines(path, encoding, newline=ROW_ENDS))
    # A line of empty cells between tabs is a row, but not a header.
    lines = ((n, line) for n, line in every if line.strip() or (reading.no_header and _usual_delimiter(path) in line))
    above, first = next(lines, (0, ""))
    if told := _SEP_LINE.fullmatch(first.rstrip("\r\n")):
        above, first = next(lines, (0, ""))
    if not first:
        raise DataError(
            f"{path}: is empty", "give a file with rows" if reading.no_header else "give a file with a header and rows"
        )
    delimiter = reading.delimiter or (told[1] if told else _delimiter(path, first))
    if reading.quoting == "none":
        given = _named(path, Layout(delimiter, "none", above, ()), reading)
        return _scan(path, encoding, given) or given
    minimal = _named(path, Layout(delimiter, "minimal", above, ()), reading)
    found = _scan(path, encoding, minimal)
    if found is not None and (not found.spanning or reading.quoting == "minimal"):
        return found
    plain = _scan_plain(path, encoding, minimal) if reading.quoting is None else None
    if found is not None:
        return plain.layout if plain is not None and plain.is_likelier else found
    if (escaped := _scan(path, encoding, replace(minimal, quoting="escaped"))) is not None:
        return escaped
    # In a CSV a lone quote is a mistake; in other files it is common.
    return plain.layout if plain is not None and delimiter != "," else minimal


def _delimiter(path: Path, first: str) -> str:
    """Return the delimiter of the file's suffix; another one if only that is in the first line."""
    usual = _usual_delimiter(path)
    return usual if usual in first else next((d for d in _DELIMITERS if d in first), usual)


def _usual_delimiter(path: Path) -> str:
    return "\t" if plain_suffix(path) == ".tsv" else ","


def _named(path: Path, layout: Layout, reading: Reading) -> Layout:
    """Return the layout with the columns that the first row names, or those of a file without a header."""
    first = _first_row(path, reading.encoding, layout)
    if reading.no_header:
        columns = reading.named(len(first), str(path))
        return replace(layout, columns=tuple(columns), header=False)
    header = [column.strip() for column in first]
    named = len(header)
    while named > 1 and not header[named - 1]:
        named -= 1
    check_header(path, header[:named])
    return replace(layout, columns=tuple(header[:named]), unnamed=len(header) - named)


def _first_row(path: Path, encoding: str | None, layout: Layout) -> list[str]:
    return next(row for _, row in _raw_rows(path, encoding, layout))


def check_header(path: Path, header: Sequence[str]) -> None:
    """Raise DataError for a column without a name, except the first, or a name given twice."""
    for number, column in enumerate(header, start=1):
        if not column and number > 1:  # the first one is the index that pandas' to_csv writes
            raise DataError(f"{path}: column {number} has no name", "name every column (pandas: to_csv(index=False))")
        if column in header[: number - 1]:
            raise DataError(f"{path}: two columns are named {column!r}", "rename one of them")


def _rows(path: Path, encoding: str | None, layout: Layout) -> Iterator[tuple[int, list[str]]]:
    """Yield the rows below the header, each with the line it begins at; repeated headers are left out."""
    rows = _raw_rows(path, encoding, layout)
    if layout.header:
        next(rows)
    for start, row in rows:
        if row and not _is_header(row, layout):
            yield start, row


def _too_many(path: Path, start: int, row: Sequence[str], layout: Layout) -> DataError:
    first = "header" if layout.header else "first row"
    return DataError(
        f"{path}: the row at line {start} has {len(row)} fields, the {first} has {len(layout.columns) + layout.unnamed}",
        f"write no {layout.delimiter!r} inside a field"
        if layout.quoting == "none"
        else f"put fields that hold {layout.delimiter!r} in double quotes",
    )


def _is_header(row: Sequence[str], layout: Layout) -> bool:
    """Return whether a row is the header, which concatenated files repeat."""
    return (
        layout.header
        and len(row) >= len(layout.columns)
        and all(cell.strip() == column for cell, column in zip(row, layout.columns))
    )


def _raw_rows(path: Path, encoding: str | None, layout: Layout) -> Iterator[tuple[int, list[str]]]:
    lines = itertools.islice(read_lines(path, encoding, newline=ROW_ENDS), layout.above, None)
    if layout.quoting == "none":
        for number, line in enumerate(lines, start=layout.above + 1):
            text = line.rstrip("\r\n")
            yield number, text.split(layout.delimiter) if text else []
        return
    rows = csv.reader(
        map(_doubled, lines) if layout.quoting == "escaped" else lines, delimiter=layout.delimiter, strict=True
    )
    start = layout.above + 1
    while True:
        try:
            row = next(rows, None)
        except csv.Error as error:
            raise _malformed(path, start, error) from None
        if row is None:
            return
        yield start, row
        start = layout.above + rows.line_num + 1


def _malformed(path: Path, start: int, error: csv.Error) -> DataError:
    reason, remedy = str(error), 'write a quote inside a quoted field as "", and close every quote'
    remedy += "; --quoting none if quotes are characters"
    if "NUL" in reason:
        remedy = "remove the NUL bytes, or use Python 3.11 or newer"
    if "new-line character" in reason:
        reason, remedy = "a carriage return stands outside quotes", "put the field in double quotes, or remove it"
    return DataError(f"{path}: the row at line {start} is malformed: {reason}", remedy)


def _doubled(line: str) -> str:
    r"""Write \" as "" and \\ as \: the csv module checks nothing in a dialect without doubled quotes."""
    return _ESCAPE.sub(lambda found: '""' if found[1] == '"' else found[1], line)


def _scan(path: Path, encoding: str | None, layout: Layout) -> Layout | None:
    """Return the counts of a layout; None if a row has another number of fields."""
    rows = spanning = first_spanning = beyond = headers = 0
    width = len(layout.columns)
    try:
        for start, row in _raw_rows(path, encoding, layout):
            if len(row) > width + layout.unnamed:
                return None
            if row and _is_header(row, layout):
                headers += 1
            elif row:
                rows += 1
                beyond += any(map(str.strip, row[width:]))
                if any("\n" in cell or "\r" in cell for cell in row):
                    spanning += 1
                    first_spanning = first_spanning or start
    except DataError:
        return None
    return replace(
        layout,
        rows=rows,
        spanning=spanning,
        first_spanning=first_spanning,
        beyond=beyond,
        repeated_headers=headers - layout.header,
    )


@dataclass(frozen=True)
class _Plain:
    """A file in which every line has as many fields as the header if quotes are ordinary characters."""

    layout: Layout
    is_likelier: bool


def _scan_plain(path: Path, encoding: str | None, minimal: Layout) -> _Plain | None:
    """Scan with quotes as ordinary characters; None if a line then has another number of fields than the header."""
    layout = replace(minimal, quoting="none")
    width = len(layout.columns)
    if width < 2 or (layout.header and any('"' in column for column in _first_row(path, encoding, layout))):
        return None
    inside = _lines_of_long_rows(path, encoding, minimal)
    values: dict[int, set[str]] = defaultdict(set)
    enclosed: list[list[str]] = []
    rows = headers = 0
    for start, row in _raw_rows(path, encoding, layout):
        if not row:
            continue
        if len(row) != width + layout.unnamed:
            return None
        if _is_header(row, layout):
            headers += 1
            continue
        rows += 1
        if start in inside:
            enclosed.append(row)
            continue
        for column, cell in enumerate(row[:width]):
            if len(values[column]) <= _MOST_VALUES:
                values[column].add(cell)
    found = replace(layout, rows=rows, repeated_headers=headers - layout.header)
    # A label inside a quoted field of several lines would be one by chance: then each line is a row.
    repeats = any(
        len(known) <= min(_MOST_VALUES, max(1, (rows - len(enclosed)) // 2))
        and all(row[c] in known for row in enclosed)
        for c, known in values.items()
    )
    return _Plain(found, repeats or layout.delimiter == "\t")


def _lines_of_long_rows(path: Path, encoding: str | None, minimal: Layout) -> set[int]:
    """Return the numbers of all lines that are part of a field of several lines when quotes enclose fields."""
    lines: set[int] = set()
    try:
        for start, row in _raw_rows(path, encoding, minimal):
            ends = sum(max(cell.count("\n"), cell.count("\r")) for cell in row)
            if ends:
                lines.update(range(start, start + ends + 1))
    except DataError:
        pass
    return lines
