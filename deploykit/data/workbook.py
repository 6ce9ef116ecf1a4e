"""Read the rows of an Excel workbook."""

from __future__ import annotations

import itertools
import re
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from deploykit.data.delimited import check_header
from deploykit.data.packages import import_data_package
from deploykit.data.reading import AS_FOUND, Reading
from deploykit.data.record import Record, malformed
from deploykit.errors import DataError, first_line
from deploykit.text import normalize

_LEADING_ZEROS = re.compile("0{2,}")
_MERGED = re.compile(rb'mergeCell [^>]*ref="([A-Z0-9:]+)"')


def read_workbook(path: Path, reading: Reading = AS_FOUND) -> Iterator[Record]:
    """Read the first sheet of a workbook: a header, then rows. Formulas have their last saved values, and numbers the leading
    zeros of their format.

    Raises DataError, also for a formula without a saved value: its cell would seem to be empty.
    """
    cells = _cells(path, data_only=True)
    rows = [[_value(cell) for cell in row] for row in cells]
    unsaved = _formulas_without_value(path, cells)
    first = next((n for n, row in enumerate(rows) if any(cell is not None for cell in row)), None)
    if first is None:
        raise unsaved.get(min(unsaved, default=0)) or DataError(
            f"{path}: is empty", "give a sheet with a header and rows"
        )
    if reading.no_header:
        header = reading.named(len(rows[first]), str(path))
    else:
        header = ["" if cell is None else str(cell).strip() for cell in rows[first]]
        while len(header) > 1 and not header[-1]:
            header.pop()
        check_header(path, header)
        _check_no_title(path, header, rows, first)
        first += 1
    for number, row in enumerate(rows[first:], start=first + 1):
        origin = f"{normalize(path.name)}:{number}"
        if number in unsaved:
            yield malformed(origin, unsaved[number], reading, named=path)
        elif any(cell is not None for cell in row):
            yield Record(origin, dict(itertools.zip_longest(header, row[: len(header)])))


def _check_no_title(path: Path, header: Sequence[str], rows: Sequence[Sequence[object]], first: int) -> None:
    """Raise DataError for a first row with one cell, which names no column, above a row with cells beyond it."""
    if sum(map(bool, header)) != 1:
        return
    for number, row in enumerate(rows[first + 1 :], start=first + 2):
        if any(cell is not None for cell in row[len(header) :]):
            raise DataError(
                f"{path}: row {first + 1} has one cell, {header[-1][:40]!r}, and row {number} has more: it seems to be a title, "
                "not the header",
                "delete the rows above the header, or name every column",
            )


def workbook_notes(path: Path) -> list[str]:
    """Return notes for the user: which sheet of several is read, and merged cells."""
    openpyxl = import_data_package("openpyxl")
    try:
        book = openpyxl.load_workbook(path, read_only=True)
        names, file = book.sheetnames, book.worksheets[0]._worksheet_path
        book.close()
        with zipfile.ZipFile(path) as archive:
            merged = [found.decode() for found in _MERGED.findall(archive.read(file))]
    except Exception as error:  # what a damaged workbook raises is not documented
        raise _unreadable(path, error) from error
    notes = []
    if len(names) > 1:
        notes.append(f"the first of {len(names)} sheets is read: {names[0]!r}")
    if merged:
        more = f" and {len(merged) - 1:,} more" if len(merged) > 1 else ""
        notes.append(f"merged cells have a value in the first cell only: {merged[0]}{more}")
    return notes


def _cells(path: Path, *, data_only: bool) -> list[tuple[Any, ...]]:
    openpyxl = import_data_package("openpyxl")
    try:
        book = openpyxl.load_workbook(path, read_only=True, data_only=data_only)
        cells = list(book.worksheets[0].iter_rows())
        book.close()
    except Exception as error:
        raise _unreadable(path, error) from error
    return cells


def _value(cell: Any) -> object:
    value = cell.value
    if isinstance(value, int | float) and not isinstance(value, bool) and _LEADING_ZEROS.fullmatch(cell.number_format):
        return f"{value:.0f}".zfill(len(cell.number_format))
    return value


def _formulas_without_value(path: Path, cells: Sequence[Sequence[Any]]) -> dict[int, DataError]:
    """Return an error for each row with a formula that no program has computed, by the row's number."""
    # An empty text that a formula computed is a text.
    if not any(cell.value is None and getattr(cell, "data_type", "") == "n" for row in cells for cell in row):
        return {}
    found: dict[int, DataError] = {}
    for number, (values, formulas) in enumerate(zip(cells, _cells(path, data_only=False)), start=1):
        for value, formula in zip(values, formulas):
            if value.value is None and value.data_type == "n" and formula.data_type == "f":
                found[number] = DataError(
                    f"{path}: the cell {formula.coordinate} holds a formula without a saved value",
                    "open the workbook in Excel or LibreOffice, and save it there",
                )
                break
    return found


def _unreadable(path: Path, error: Exception) -> DataError:
    return DataError(f"{path}: is not a readable workbook: {first_line(error)}", "save it again")
