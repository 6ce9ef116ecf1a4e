"""Any pairs in any file: each is read as it was written, no translation stands in another row's place, no traceback.

``HYPOTHESIS_PROFILE=long`` tries 2,000 files.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from xml.sax.saxutils import escape

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from deploykit.data.reading import AS_FOUND, Reading
from deploykit.errors import DataError, DeploykitError
from deploykit.runtime.generation import Generation
from deploykit.tasks.answering import answer_source
from deploykit.tasks.translation.facts import Translation
from deploykit.tasks.translation.pairs import one_line
from deploykit.tasks.translation.read_pairs import load_pairs, read_sources
from deploykit.tasks.translation.translated import Translated
from deploykit.text import normalize
from tests.support.compressed import COMPRESSIONS, compressed

FILES = 2000 if os.environ.get("HYPOTHESIS_PROFILE") == "long" else 40
FUZZ = settings(max_examples=FILES, deadline=None, suppress_health_check=list(HealthCheck), derandomize=FILES < 2000)
NUMBER = itertools.count()
ODD = ['"', "'", ",", ";", "|", "\\", '""', "\u2028", "\x85", "<b>", "&amp;", "%s", "#", "msgid", "null", " ", "=1+1"]
LETTERS = st.characters(
    codec="utf-8", categories=("L", "M", "N", "P", "S", "Zs"), exclude_characters="\ufeff\ufffe\uffff"
)
PARTS = st.lists(st.one_of(st.sampled_from([*ODD, "w1", "w2"]), st.text(LETTERS, max_size=4)), min_size=1, max_size=5)
LINES = PARTS.map("".join)
TEXTS = PARTS.flatmap(lambda parts: st.sampled_from(["", "\n", "\t", "\r\n"]).map(lambda between: between.join(parts)))
KINDS = ("csv", "tsv", "plain tsv", "headerless tsv", "jsonl", "nested jsonl", "parquet", "xlsx", "lines", "tmx", "po")
FACTS = Translation("en", "fr", "marian", 100, 64, 64, 0, (1,), 0)


@dataclass(frozen=True)
class Written:
    """A file, or two, by name; what names them to a command; its rows."""

    files: dict[str, bytes]
    source: str
    rows: list[tuple[str, str]]
    reading: Reading = AS_FOUND


class Reversing:
    """A translator that answers each text's characters in reverse, and refuses calls with "w2"."""

    task = FACTS

    def translate(self, texts: Sequence[str], generation: Generation | None = None, **_: object) -> list[Translated]:
        if any("w2" in text for text in texts):
            raise DataError("it is refused")
        return [Translated(text[::-1], 0.0, 1, 1, "eos") for text in texts]

    def close(self) -> None: ...


@st.composite
def written(draw: st.DrawFn) -> Written:
    kind = draw(st.sampled_from(KINDS))
    one_line = kind in ("plain tsv", "headerless tsv", "lines")
    rows = draw(st.lists(st.tuples(*(LINES if one_line else TEXTS,) * 2), min_size=1, max_size=8))
    if kind == "csv" or kind == "tsv":
        table = io.StringIO()
        writer = csv.writer(table, delimiter="\t" if kind == "tsv" else ",", quoting=csv.QUOTE_ALL)
        writer.writerows([("en", "fr"), *rows])
        suffix = draw(st.sampled_from(COMPRESSIONS))
        content = compressed(table.getvalue().encode(), suffix, f"a.{kind}")
        return Written({f"a.{kind}{suffix}": content}, f"a.{kind}{suffix}", rows, Reading(quoting="minimal"))
    if kind == "plain tsv":
        lines = "".join(f"{en}\t{fr}\n" for en, fr in [("en", "fr"), *rows])
        return Written({"a.tsv": lines.encode()}, "a.tsv", rows, Reading(quoting="none"))
    if kind == "headerless tsv":
        assume(any(text.strip() for row in rows for text in row))  # blank lines alone are refused as an empty file
        return Written({"a.tsv": "".join(f"{en}\t{fr}\n" for en, fr in rows).encode()}, "a.tsv", rows)
    if kind == "lines":
        sides = ("".join(f"{row[side]}\n" for row in rows).encode() for side in (0, 1))
        return Written(dict(zip(("a.en", "a.fr"), sides)), "a", rows)
    if kind in ("jsonl", "nested jsonl"):
        records = [{"en": en, "fr": fr} for en, fr in rows]
        lines = "".join(json.dumps({"translation": r} if kind != "jsonl" else r) + "\n" for r in records)
        suffix = draw(st.sampled_from(COMPRESSIONS))
        content = compressed(lines.encode(), suffix, "a.jsonl")
        return Written({f"a.jsonl{suffix}": content}, f"a.jsonl{suffix}", rows)
    if kind == "parquet":
        pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        whole = io.BytesIO()
        parquet.write_table(pyarrow.table({"en": [en for en, _ in rows], "fr": [fr for _, fr in rows]}), whole)
        return Written({"a.parquet": whole.getvalue()}, "a.parquet", rows)
    if kind == "xlsx":
        table_rows = [("en", "fr", "n"), *((en, fr, str(n)) for n, (en, fr) in enumerate(rows))]
        return Written({"a.xlsx": _workbook(table_rows)}, "a.xlsx", rows)
    if kind == "tmx":
        units = "".join(
            "<tu>"
            + "".join(
                f'<tuv xml:lang="{code}"><seg>{escape(text, {chr(13): "&#13;"})}</seg></tuv>'
                for code, text in zip(("en", "fr"), row)
            )
            + "</tu>"
            for row in rows
        )
        return Written({"a.tmx": f'<tmx version="1.4"><body>{units}</body></tmx>'.encode()}, "a.tmx", rows)
    head = 'msgid ""\nmsgstr "Content-Type: text/plain; charset=UTF-8\\n"\n\n'
    entries = "".join(f"msgid {json.dumps(en, ensure_ascii=False)}\nmsgstr {_po(fr)}\n\n" for en, fr in rows)
    assume(len({en for en, _ in rows}) == len(rows) and all(en for en, _ in rows))
    return Written({"fr.po": (head + entries).encode()}, "fr.po", rows)


def _po(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _workbook(rows: Sequence[Sequence[str]]) -> bytes:
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    for number, row in enumerate(rows, start=1):
        for column, text in enumerate(row, start=1):
            cell = book.active.cell(number, column, text)
            cell.data_type = "s"  # and no formula
    whole = io.BytesIO()
    book.save(whole)
    return whole.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pairs")


def _cell(text: str, name: str) -> str | None:
    """Return what a kind of file keeps of a text."""
    if name.endswith((".xlsx", ".tmx", ".po")):
        text = text.replace("\r\n", "\n")
    return normalize(text)


@FUZZ
@given(file=written(), table=st.booleans())
def test_pairs_are_read_as_written_and_translated_in_their_rows(folder: Path, file: Written, table: bool) -> None:
    here = folder / str(next(NUMBER))
    here.mkdir()
    for name, content in file.files.items():
        (here / name).write_bytes(content)
    source = str(here / file.source)
    raw, _ = load_pairs(source, source="en", target="fr", reading=file.reading)
    expected = [tuple(_cell(text, file.source) for text in row) for row in file.rows]
    assert [(_cell(row.source or "", file.source), _cell(row.target or "", file.source)) for row in raw] == expected
    is_table = file.reading != AS_FOUND or file.source.startswith(("a.jsonl", "a.parquet", "a.xlsx"))
    out = ".csv" if table and is_table else ".jsonl"
    texts = str(here / "a.en") if file.source == "a" else source
    if file.source == "a":
        os.rename(here / "a.en", texts := str(here / "a.txt"))
    rows = list(read_sources(texts, source="en", reading=file.reading))
    # A line of text is translated as one line.
    sources = [one_line(en or "") if file.source == "a" else en for en, _ in expected]
    assert [_cell(row.text or "", file.source) for row in rows] == sources
    done = answer_source(
        Reversing(), texts, here / f"out{out}", identity="reversing", columns={},
        reading=replace(file.reading, on_error="skip"),
        progress=lambda done, of: None,
    )  # fmt: skip
    records = _answers(here / f"out{out}")
    assert (done.rows, done.errors) == (len(rows), sum(row.text is None or "w2" in row.text for row in rows))
    assert records == ["" if row.text is None or "w2" in row.text else row.text[::-1] for row in rows]


def _answers(path: Path) -> list[str]:
    with path.open(encoding="utf-8", newline="") as file:
        if path.suffix == ".csv":
            # Rows of nested JSON lines have a column "translation" of their own.
            return [row.get("predicted_translation", row["translation"]) for row in csv.DictReader(file)]
        return [json.loads(line).get("translation", "") for line in file.read().split("\n")[:-1]]


@FUZZ
@given(
    content=st.one_of(st.binary(max_size=200), st.lists(TEXTS, max_size=8).map(lambda texts: "\n".join(texts).encode())),
    name=st.sampled_from(["a.csv", "a.tsv", "a.txt", "a.jsonl", "a.json", "a.parquet", "a.xlsx", "a.tmx", "a.po", "a.mo", "a.zip", "a.tsv.zst"]),
    encoding=st.sampled_from([None, "latin-1", "utf-16"]),
    begin=st.sampled_from([b"", b'msgid "a"\nmsgstr "b"\n\n', b"<tmx><body><tu>", b"\xde\x12\x04\x95\0\0\0\0\1\0\0\0\x1c\0\0\0\x24\0\0\0", b"en\tfr\n", b"en,fr\n"]),
)  # fmt: skip
def test_any_bytes_are_read_as_pairs_or_refused_with_a_clear_error(
    folder: Path, content: bytes, name: str, encoding: str | None, begin: bytes
) -> None:
    path = folder / f"{next(NUMBER)}{name}"
    path.write_bytes(begin + content)
    reading = Reading(encoding=encoding)
    for error in (
        _refused(lambda: load_pairs(str(path), source="en", target="fr", reading=reading)),
        _refused(lambda: list(read_sources(str(path), source="en", reading=reading))),
    ):
        assert error is None or path.name in error.message or "--" in error.message
        assert error is None or error.remedy


def _refused(read: Callable[[], object]) -> DeploykitError | None:
    try:
        read()
    except DeploykitError as error:
        return error
    return None
