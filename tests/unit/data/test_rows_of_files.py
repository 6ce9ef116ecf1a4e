"""Any table in any file: each row has the answer that its text has alone, and no error is a traceback.

``HYPOTHESIS_PROFILE=long`` tries 2,000 tables.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from deploykit.data.reading import Reading
from deploykit.data.texts import TextRow, read_texts
from deploykit.errors import DataError, DeploykitError
from deploykit.tasks.answering import answer_rows, answer_source
from deploykit.tasks.opening import open_predictor
from deploykit.text import normalize
from tests.support.compressed import COMPRESSIONS, compressed

TABLES = 2000 if os.environ.get("HYPOTHESIS_PROFILE") == "long" else 30
FUZZ = settings(max_examples=TABLES, deadline=None, suppress_health_check=list(HealthCheck), derandomize=TABLES < 2000)
NUMBER = itertools.count()

# Characters that readers trip over, among words that the model knows. A byte order mark that opens a file is none of its text.
ODD = [
    '"',
    "'",
    ",",
    ";",
    "\t",
    "|",
    "\r",
    "\n",
    "\\",
    '""',
    "\u2028",
    "\x85",
    "\x0b",
    "\x1f",
    "nan",
    "null",
    "refuse",
    " ",
    "{",
    "[",
    "#",
]
WORDS = [f"w{i}" for i in range(9)]
LETTERS = st.characters(codec="utf-8", exclude_characters="\ufeff" if sys.version_info >= (3, 11) else "\0\ufeff")
TEXTS = st.lists(st.one_of(st.sampled_from([*ODD, *WORDS]), st.text(LETTERS, max_size=4)), max_size=6).map("".join)
NOT_IN_XML = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff]")


@dataclass(frozen=True)
class Table:
    """A file's bytes and name, how it is read, and its texts: None for a row without one."""

    name: str
    content: bytes
    reading: Reading
    texts: list[str | None]


class Refusing:
    """The tiny classifier, which refuses every call with "refuse" in one of its texts."""

    def __init__(self, folder: Path) -> None:
        self._inner: Any = open_predictor(str(folder), url="")
        self.task = self._inner.task

    def scores(self, texts: Sequence[str]) -> NDArray[np.float32]:
        if any("refuse" in text for text in texts):
            raise DataError("it is refused")
        found: NDArray[np.float32] = self._inner.scores(texts)
        return found

    def close(self) -> None: ...


@st.composite
def tables(draw: st.DrawFn) -> Table:
    kind = draw(st.sampled_from(["csv", "tsv", "plain", "jsonl", "json", "parquet", "xlsx", "txt"]))
    texts: list[str | None] = list(draw(st.lists(TEXTS, min_size=1, max_size=9)))
    encoding = draw(st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]))
    compression = draw(st.sampled_from(COMPRESSIONS))
    if kind in ("plain", "txt"):
        texts = [
            (text or "").translate(dict.fromkeys(map(ord, "\n\t" if kind == "plain" else "\n"), " ")) for text in texts
        ]
    if kind in ("jsonl", "json", "parquet"):
        gaps = draw(st.sets(st.integers(0, len(texts) - 1), max_size=2))
        texts = [None if i in gaps and len(texts) > 2 else text for i, text in enumerate(texts)]
    if kind == "parquet":
        return Table("a.parquet", _parquet(texts), Reading(on_error="skip"), texts)
    if kind == "xlsx":
        texts = [NOT_IN_XML.sub(" ", text or "").replace("\r", " ") or None for text in texts]
        return Table("a.xlsx", _workbook(texts), Reading(on_error="skip"), texts)
    header = draw(st.booleans())
    reading = Reading(on_error="skip")
    if kind in ("csv", "tsv"):
        delimiter = draw(st.sampled_from([None, ",", ";", "\t", "|", "^"]))
        minimal = draw(st.booleans())
        columns = () if header else ("n", "text")
        reading = Reading(None, delimiter, "minimal" if minimal or not header else None, not header, columns, "skip")
        written = io.StringIO()
        used = delimiter or ("\t" if kind == "tsv" else ",")
        # What is found of a file whose fields are not all quoted may be another layout; then --quoting is given.
        writer = csv.writer(written, delimiter=used, quoting=csv.QUOTE_MINIMAL if reading.quoting else csv.QUOTE_ALL)
        writer.writerows(([("n", "text")] if header else []) + [(str(i), text) for i, text in enumerate(texts)])
        content = written.getvalue()
    elif kind == "plain":
        columns = () if header else ("n", "text")
        reading = Reading(None, "\t", "none", not header, columns, "skip")
        content = ("n\ttext\n" if header else "") + "".join(f"{i}\t{text}\n" for i, text in enumerate(texts))
    elif kind == "txt":
        content = "".join(f"{text}\n" for text in texts)
    else:
        rows = [json.dumps({"n": i, "text": text}, ensure_ascii=header) for i, text in enumerate(texts)]
        content = "[" + ",".join(rows) + "]" if kind == "json" else "\n".join(rows) + "\n"
    suffix = ".tsv" if kind == "plain" else f".{kind}"
    return Table(
        f"a{suffix}{compression}", compressed(content.encode(encoding), compression, f"a{suffix}"), reading, texts
    )


def _parquet(texts: Sequence[str | None]) -> bytes:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    whole = io.BytesIO()
    table = pyarrow.table({"n": [str(i) for i in range(len(texts))], "text": pyarrow.array(texts, pyarrow.string())})
    parquet.write_table(table, whole)
    return whole.getvalue()


def _workbook(texts: Sequence[str | None]) -> bytes:
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    book.active.append(["n", "text"])
    for i, text in enumerate(texts):
        book.active.append([str(i), None])
        if text is not None:
            cell = book.active.cell(i + 2, 2, text)
            cell.data_type = "s"  # and no formula
    whole = io.BytesIO()
    book.save(whole)
    return whole.getvalue()


@pytest.fixture(scope="module")
def model(tiny_export: Path) -> Refusing:
    return Refusing(tiny_export)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tables")


def _read(path: Path, reading: Reading, columns: Sequence[str] = ()) -> list[TextRow] | DeploykitError:
    try:
        return list(read_texts(str(path), columns, reading=reading))
    except DeploykitError as error:
        return error


@FUZZ
@given(table=tables(), out=st.sampled_from([".jsonl", ".csv", ".tsv", ".parquet"]), cuts=st.sets(st.integers(1, 8)))
def test_each_row_has_the_answer_of_its_text_alone(
    model: Refusing, folder: Path, table: Table, out: str, cuts: set[int]
) -> None:
    path = folder / f"{next(NUMBER)}{table.name}"
    path.write_bytes(table.content)
    rows = _read(path, table.reading, ("text",))
    if isinstance(rows, DeploykitError):
        assert "is not text" in rows.message  # so many control characters are taken for a binary file
        reject()
    assert [row.text for row in rows] == [text if text is None else normalize(text) for text in table.texts]
    alone = [answer_rows(model, [row])[0].to_json() for row in rows]
    bounds = [0, *sorted(cut for cut in cuts if cut < len(rows)), len(rows)]
    parts = [answer_rows(model, rows[a:b]) for a, b in itertools.pairwise(bounds)]
    assert [row.to_json() for part in parts for row in part] == alone
    written = path.with_name(f"{path.name}.answers{out}")
    done = answer_source(
        model, str(path), written, identity="tiny", columns={"text_column": ("text",)}, reading=table.reading,
        progress=lambda done, of: None,
    )  # fmt: skip
    assert (done.rows, done.errors) == (len(rows), sum("error" in record for record in alone))
    if out == ".jsonl":
        lines = written.read_text(encoding="utf-8").split("\n")  # splitlines would also split at U+2028
        assert [json.loads(line) for line in lines[:-1]] == alone
    else:
        assert [(row["n"], row["label"]) for row in _table(written, out)] == [  # the column is there if all failed
            (str(i), record.get("label", "")) for i, record in enumerate(alone)
        ]


def _table(path: Path, suffix: str) -> list[dict[str, Any]]:
    """Return the rows of a table, with their numbers; of a text file's, which has none, the places."""
    if suffix == ".parquet":
        parquet = pytest.importorskip("pyarrow.parquet")
        rows = parquet.read_table(path).to_pylist()
    else:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file, delimiter="\t" if suffix == ".tsv" else ","))
    return [
        {"n": str(row.get("n", i)), "label": "" if row["label"] is None else row["label"]} for i, row in enumerate(rows)
    ]


@FUZZ
@given(
    content=st.one_of(st.binary(max_size=200), st.lists(TEXTS, max_size=8).map(lambda texts: "\n".join(texts).encode())),
    suffix=st.sampled_from([".csv", ".tsv", ".txt", ".jsonl", ".json", ".parquet", ".csv.gz", ".txt.zip", ".xlsx", ".csv.xz", ".csv.zst"]),
    reading=st.builds(
        Reading,
        encoding=st.sampled_from([None, "latin-1", "utf-16", "utf-8"]),
        delimiter=st.sampled_from([None, ";", "\t", "x"]),
        quoting=st.sampled_from([None, "none", "minimal"]),
        no_header=st.booleans(),
        on_error=st.sampled_from(["stop", "skip"]),
    ),
)  # fmt: skip
def test_any_bytes_are_read_or_refused_with_a_clear_error(
    folder: Path, content: bytes, suffix: str, reading: Reading
) -> None:
    path = folder / f"{next(NUMBER)}{suffix}"
    path.write_bytes(content)
    rows = _read(path, reading)
    if isinstance(rows, DeploykitError):
        assert path.name in rows.message or "--" in rows.message
        assert rows.remedy
    else:
        assert all(isinstance(row, TextRow) and (row.text is None) == bool(row.problem) for row in rows)
