"""Write answers next to the columns of their rows, as CSV, TSV or Parquet."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from deploykit.data.packages import import_data_package
from deploykit.text import without_surrogates

TABLES = (".csv", ".tsv", ".parquet")
"""The suffixes of tables."""

Rows = Callable[[], Iterable[Mapping[str, object]]]


def write_table(answers: Path, rows: Rows, out: Path, columns: Sequence[str]) -> None:
    """Write the answers of a file of JSON lines to the table ``out``, each next to the columns of its row.

    An answer column whose name the rows already have is called "predicted_NAME", and "predicted_predicted_NAME" if they have
    that too: rows may be the answers of an earlier run. Lists and objects, such as the scores of all labels, are written as
    JSON. ``rows`` returns the rows, one for each line, each time it is
    called. ``columns`` are those that every answer has; the table has them even if every row failed.
    """
    own = list(dict.fromkeys(name for row in rows() for name in row))
    written = (name for record in _read(answers) for name in record if name not in ("origin", "text"))
    found = list(dict.fromkeys((*columns, *written)))
    names = {name: _free(name, own) for name in sorted(found, key=lambda n: n == "error")}

    def table() -> Iterator[list[object]]:
        for row, record in zip(rows(), _read(answers), strict=True):
            yield [_cell(row.get(name)) for name in own] + [_cell(record.get(name)) for name in names]

    header = [*own, *names.values()]
    if out.suffix.lower() == ".parquet":
        _write_parquet(header, table(), answers.with_suffix(".table"))
    else:
        with answers.with_suffix(".table").open("w", encoding="utf-8", newline="") as file:
            # The writer quotes carriage returns only if they are part of the line end.
            lines = SimpleNamespace(write=lambda line: file.write(line.removesuffix("\r\n") + "\n"))
            writer = csv.writer(lines, delimiter="\t" if out.suffix.lower() == ".tsv" else ",", lineterminator="\r\n")
            writer.writerow(header)
            writer.writerows(["" if cell is None else cell for cell in row] for row in table())
    answers.with_suffix(".table").replace(out)


def _read(answers: Path) -> Iterator[dict[str, Any]]:
    with answers.open(encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def _free(name: str, taken: Sequence[str]) -> str:
    while name in taken:
        name = f"predicted_{name}"
    return name


def _cell(value: object) -> object:
    """Return a value that every kind of table can store."""
    if value is None or isinstance(value, (int, float)):
        return value
    nested = isinstance(value, (list, dict))
    return without_surrogates(json.dumps(value, ensure_ascii=False, default=str) if nested else str(value))


def _write_parquet(header: Sequence[str], rows: Iterator[list[object]], path: Path) -> None:
    """Write numeric columns as numbers, and other columns as text, as those with numbers that Parquet's types cannot hold."""
    pyarrow, parquet = import_data_package("pyarrow"), import_data_package("pyarrow.parquet")
    columns: list[list[object]] = [list(column) for column in zip(*rows)] or [[] for _ in header]

    def array(column: Sequence[object]) -> Any:
        kinds = {type(cell) for cell in column if cell is not None}
        if kinds <= {int, float} or kinds <= {bool}:
            with suppress(OverflowError, pyarrow.ArrowInvalid):
                return pyarrow.array(column)
        return pyarrow.array([None if cell is None else str(cell) for cell in column], pyarrow.string())

    arrays = [array(column) for column in columns]
    parquet.write_table(pyarrow.Table.from_arrays(arrays, names=list(header)), path)
