"""Workbooks as people write them in Excel."""

from __future__ import annotations

import datetime
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openpyxl
import pytest

from deploykit.data.read import read_records, reading_notes
from deploykit.data.reading import Reading
from deploykit.data.texts import read_texts
from deploykit.errors import DataError
from deploykit.tasks.classification.pairs import read_pairs
from deploykit.tasks.classification.rows import load_examples
from deploykit.tasks.question_answering.rows import read_rows
from deploykit.tasks.translation.read_pairs import load_pairs, read_sources


def _book(path: Path, *rows: tuple[Any, ...]) -> Any:
    book = openpyxl.Workbook()
    for row in (("text", "label"), *rows):
        book.active.append(row)
    book.save(path)
    return book


def _values(path: Path, **reading: Any) -> list[tuple[object, ...]]:
    return [tuple(record.values.values()) for record in read_records(str(path), Reading(**reading))]


def _compute(path: Path, cell: str, value: str, kind: str = "") -> None:
    """Store what a formula has computed, as Excel does."""
    with zipfile.ZipFile(path) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    name = "xl/worksheets/sheet1.xml"
    pattern = rf'<c r="{cell}"[^>]*>(<f>[^<]*</f>)<v\s*(?:/>|></v>)</c>'.encode()
    files[name], count = re.subn(pattern, rf'<c r="{cell}"{kind}>\1<v>{value}</v></c>'.encode(), files[name])
    assert count == 1
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)


def test_formulas_have_their_saved_values_and_no_others(tmp_path: Path) -> None:
    path = tmp_path / "a.xlsx"
    _book(path, ("one", 1), ('=LOWER("TWO")', "=1+1"), ("three", None))
    with pytest.raises(DataError, match=r"a.xlsx: the cell A3 holds a formula without a saved value") as error:
        _values(path)
    assert "save it there" in error.value.remedy
    skipped = list(read_records(str(path), Reading(on_error="skip")))
    assert [record.problem for record in skipped] == ["", "the cell A3 holds a formula without a saved value", ""]
    assert skipped[1].origin == "a.xlsx:3"
    _compute(path, "A3", "two", ' t="str"')
    with pytest.raises(DataError, match="the cell B3 holds a formula"):
        _values(path)
    _compute(path, "B3", "2")
    assert _values(path) == [("one", 1), ("two", 2), ("three", None)]


def test_an_empty_text_that_a_formula_computed_is_no_error(tmp_path: Path) -> None:
    path = tmp_path / "a.xlsx"
    _book(path, ('=IF(1=2,"a","")', "x"), (None, "y"))
    _compute(path, "A2", "", ' t="str"')
    assert _values(path) == [(None, "x"), (None, "y")]


def test_numbers_and_dates_are_read_as_they_are_stored(tmp_path: Path) -> None:
    path = tmp_path / "a.xlsx"
    book = _book(path, ("007", 7), ("1.50", 1.5), ("date", datetime.date(2024, 5, 1)), ("yes", True))
    book.active["B2"].number_format = "00000"
    book.active["B3"].number_format = "0.00"
    book.save(path)
    assert _values(path) == [
        ("007", "00007"), ("1.50", 1.5), ("date", datetime.datetime(2024, 5, 1)), ("yes", True),
    ]  # fmt: skip


def test_other_sheets_and_merged_cells_are_told_of(tmp_path: Path) -> None:
    path = tmp_path / "a.xlsx"
    book = _book(path, ("one", "x"), ("two", None), ("three", None))
    assert reading_notes(str(path)) == []
    book.active.merge_cells("B2:B4")
    book.create_sheet("Notes").append(["not", "read"])
    book.save(path)
    assert reading_notes(str(path)) == [
        "the first of 2 sheets is read: 'Sheet'", "merged cells have a value in the first cell only: B2:B4",
    ]  # fmt: skip
    assert _values(path) == [("one", "x"), ("two", None), ("three", None)]


DATES = {
    datetime.datetime(2024, 5, 1, 13, 30): "a date",
    datetime.time(13, 30): "a time",
    datetime.timedelta(hours=26): "a duration",
}


@pytest.mark.parametrize("value", DATES)
def test_a_date_is_no_text_of_any_task(value: object, tmp_path: Path) -> None:
    told, skip = f"holds {DATES[value]}, not a text", Reading(on_error="skip")

    def book(*header: str) -> str:
        book = openpyxl.Workbook()
        for row in (header, ["good"] * len(header), [value] * len(header)):
            book.active.append(row)
        book.save(tmp_path / "a.xlsx")
        return str(tmp_path / "a.xlsx")

    readers: dict[tuple[str, ...], Callable[[str, Reading], Any]] = {
        ("text",): lambda path, reading: list(read_texts(path, reading=reading)),
        ("text", "label"): lambda path, reading: load_examples(path, reading=reading)[0],
        ("text", "text_pair"): lambda path, reading: list(read_pairs(path, (), reading)),
        ("en", "fr"): lambda path, reading: load_pairs(path, source="en", target="fr", reading=reading)[0],
        ("en",): lambda path, reading: list(read_sources(path, source="en", reading=reading)),
        ("question", "context", "answer"): lambda path, reading: list(read_rows(path, reading=reading)),
    }
    for header, read in readers.items():
        path = book(*header)
        assert [row.problem or "" for row in read(path, skip)] == ["", f"'{header[0]}' {told}"]
        with pytest.raises(DataError, match=f"^a.xlsx:3: '{header[0]}' {told}") as error:
            read(path, Reading())
        assert error.value.remedy == "format the column as text, or use --on-error skip"
