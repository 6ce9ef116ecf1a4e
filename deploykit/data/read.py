"""Stream rows from a file, a saved dataset or the Hugging Face hub."""

from __future__ import annotations

import codecs
import csv
import importlib
import itertools
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from deploykit.errors import DataError, MissingDependencyError, UsageError
from deploykit.text import normalize

# Raise csv's limit of 131,072 characters per field, which is global to the process.
csv.field_size_limit(min(sys.maxsize, 2**31 - 1))

_BATCH = 1000
_SAMPLE_BYTES = 8192
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)
_C0_CONTROL = re.compile(r"[\x00-\x08\x0e-\x1a\x1c-\x1f]")
# UTF-32 first, because its little-endian mark begins with that of UTF-16.
_BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_MAGIC = (
    (b"\x89PNG\r\n", "a PNG image"),
    (b"\xff\xd8\xff", "a JPEG image"),
    (b"GIF87a", "a GIF image"),
    (b"GIF89a", "a GIF image"),
    (b"%PDF-", "a PDF document"),
    (b"PK\x03\x04", "a zip archive or an Excel workbook (.xlsx)"),
    (b"\xd0\xcf\x11\xe0", "an old Excel workbook (.xls)"),
    (b"PAR1", "a Parquet file"),
    (b"ARROW1", "an Arrow file"),
    (b"\x1f\x8b", "a gzip file"),
    (b"BZh", "a bzip2 file"),
    (b"\xfd7zXZ", "an xz file"),
    (b"\x28\xb5\x2f\xfd", "a zstd file"),
    (b"SQLite format 3", "an SQLite database"),
    (b"\x80\x04\x95", "a Python pickle"),
)


@dataclass(frozen=True)
class Record:
    """A row. ``origin`` names it in messages: file and line (Parquet, datasets: row), as in "tweets.csv:17"."""

    origin: str
    values: Mapping[str, object]


def read_records(source: str, *, encoding: str | None = None, split: str = "train") -> Iterator[Record]:
    """Stream the rows of ``source``. Only a .json array is held in memory as a whole.

    Args:
        source: a .csv, .tsv, .jsonl, .ndjson, .json (array of objects) or .parquet file, a directory
            that ``Dataset.save_to_disk`` wrote, or the id of a dataset on the Hugging Face hub.
        encoding: of text files; None for UTF-8, or as a byte order mark says.
        split: of a dataset that has several; a file or a single dataset is read as a whole.

    Raises:
        DataError: the source cannot be read, or the row named in the message is malformed.
        UsageError: ``encoding`` is not the name of a text encoding.
        MissingDependencyError: datasets or pyarrow is needed and not installed.
    """
    suffix = Path(source).suffix.lower()
    if os.path.isdir(source):
        yield from _saved_dataset(source, split)
    elif suffix not in _READERS and not os.path.exists(source) and _HUB_ID.fullmatch(source):
        yield from _hub_dataset(source, split)
    else:
        if not os.path.exists(source):
            raise DataError(f"{source}: no such file", "check the path")
        if suffix not in _READERS:
            raise DataError(
                f"{source}: file type {suffix!r} is not supported",
                f"give one of {', '.join(_READERS)}, a saved dataset's directory, or the id of a dataset on the hub",
            )
        yield from _READERS[suffix](Path(source), encoding)


def read_lines(path: Path, encoding: str | None, *, newline: str | None = None) -> Iterator[str]:
    """Stream the lines of a text file, ends included (``newline`` as in ``open``). Raises like ``read_records``."""
    try:
        file, used = _open_text(path, encoding, newline)
        with file:
            try:
                yield from file
            except UnicodeError:
                raise _not_decodable(path, used) from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}", "check the file") from error


def import_data_package(name: str) -> Any:
    """Import a package of the ``finetune`` extra. Raises MissingDependencyError naming it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingDependencyError(
            f"this source needs the package {name!r}, which is not installed", "pip install 'deploykit[finetune]'"
        ) from error


def _csv(path: Path, encoding: str | None) -> Iterator[Record]:
    lines = read_lines(path, encoding, newline="")
    # The csv module skips blank lines above the header, so count them here.
    above, first = next(((n, line) for n, line in enumerate(lines) if line.strip()), (0, ""))
    if not first:
        raise DataError(f"{path}: is empty", "give a file with a header and rows")
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    if delimiter not in first:
        delimiter = next((d for d in (";", "\t") if d in first), delimiter)
    rows = csv.reader(itertools.chain([first], lines), delimiter=delimiter, strict=True)
    name, header, start = normalize(path.name), list[str](), above + 1
    while True:
        try:
            row = next(rows, None)
        except csv.Error as error:
            remedy = 'write a quote inside a quoted field as "", and close every quote'
            if "NUL" in str(error):
                remedy = "remove the NUL bytes, or use Python 3.11 or newer"
            raise DataError(f"{path}: the row at line {start} is malformed: {error}", remedy) from None
        if row is None:
            return
        if not header:
            header = [column.strip() for column in row]
            _check_header(path, header)
        elif len(row) > len(header):
            raise DataError(
                f"{path}: the row at line {start} has {len(row)} fields, the header has {len(header)}",
                f"put fields that hold {delimiter!r} in double quotes",
            )
        elif row:
            yield Record(f"{name}:{start}", dict(itertools.zip_longest(header, row)))
        start = above + rows.line_num + 1


def _jsonl(path: Path, encoding: str | None) -> Iterator[Record]:
    # Only \n ends a line: JSON allows U+2028 and others inside strings.
    for number, line in enumerate(read_lines(path, encoding, newline="\n"), start=1):
        if line.strip():
            record = _parse_json(path, line, f"line {number}")
            yield Record(f"{normalize(path.name)}:{number}", _object(path, record, f"line {number}"))


def _json(path: Path, encoding: str | None) -> Iterator[Record]:
    records = _parse_json(path, "".join(read_lines(path, encoding)), "the file")
    if not isinstance(records, list):
        raise DataError(
            f"{path}: is not a JSON array", "give an array of objects; name a file with one object per line .jsonl"
        )
    for number, record in enumerate(records, start=1):
        yield Record(f"{normalize(path.name)}:{number}", _object(path, record, f"row {number}"))


def _parse_json(path: Path, text: str, where: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        remedy = "correct it, or name a file of one object a line .jsonl"
        raise DataError(f"{path}: {where} is not JSON: {error}", remedy) from None


def _object(path: Path, record: object, where: str) -> dict[str, object]:
    if not isinstance(record, dict):
        raise DataError(f"{path}: {where} is not a JSON object", 'write each row as {"text": ..., "label": ...}')
    return record


def _parquet(path: Path, encoding: str | None) -> Iterator[Record]:
    pyarrow, parquet = import_data_package("pyarrow"), import_data_package("pyarrow.parquet")
    name, done = normalize(path.name), 0
    try:
        with parquet.ParquetFile(path) as file:
            _check_header(path, file.schema_arrow.names)
            for batch in file.iter_batches(batch_size=_BATCH):
                for values in batch.to_pylist():
                    done += 1
                    yield Record(f"{name}:{done}", values)
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        raise DataError(f"{path}: cannot be read after row {done}: {_first_line(error)}", "write it again") from error


_READERS: Mapping[str, Callable[[Path, str | None], Iterator[Record]]] = {
    ".csv": _csv,
    ".tsv": _csv,
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".json": _json,
    ".parquet": _parquet,
}


def _saved_dataset(source: str, split: str) -> Iterator[Record]:
    datasets = import_data_package("datasets")
    try:
        loaded = datasets.load_from_disk(source)
    except Exception as error:  # The exceptions for a damaged directory are not documented.
        raise DataError(
            f"{source}: is not a saved dataset: {_first_line(error)}", "give a file, or what save_to_disk wrote"
        ) from error
    if isinstance(loaded, datasets.DatasetDict):
        if split not in loaded:
            raise DataError(f"{source}: has no split {split!r}", f"it has {', '.join(map(str, loaded))}")
        loaded = loaded[split]
    yield from _dataset_rows(loaded, source)


def _hub_dataset(source: str, split: str) -> Iterator[Record]:
    datasets = import_data_package("datasets")
    try:
        loaded = datasets.load_dataset(source, split=split)
    except Exception as error:  # Offline, not found, gated, unknown split, wrong format: each has its own class.
        raise DataError(
            f"{source}: is not a file, and its split {split!r} cannot be loaded from the hub: {_first_line(error)}",
            "check the path; for a hub dataset, check its id, the split and the network",
        ) from error
    yield from _dataset_rows(loaded, source)


def _dataset_rows(dataset: Any, source: str) -> Iterator[Record]:
    name, done = normalize(Path(source).name), 0
    try:
        for batch in dataset.with_format(None).iter(batch_size=_BATCH):
            columns = [
                [_label_names(dataset.features.get(column), value) for value in values]
                for column, values in batch.items()
            ]
            for row in zip(*columns):
                done += 1
                yield Record(f"{name}:{done}", dict(zip(batch, row)))
    except Exception as error:  # Decoding a column may fail in any library.
        raise DataError(f"{source}: cannot be read after row {done}: {_first_line(error)}", "save it again") from error


def _label_names(feature: Any, value: object) -> object:
    """Replace a ClassLabel's numbers, single or in a list, by names; -1 (no label) becomes None."""
    if isinstance(value, list) and hasattr(feature, "feature"):
        return [_label_names(feature.feature, item) for item in value]
    if isinstance(value, int) and hasattr(feature, "int2str"):
        return feature.int2str(value) if value >= 0 else None
    return value


def _check_header(path: Path, header: Sequence[str]) -> None:
    for number, column in enumerate(header, start=1):
        if not column and number > 1:  # the first one is the index that pandas' to_csv writes
            raise DataError(f"{path}: column {number} has no name", "name every column (pandas: to_csv(index=False))")
        if column in header[: number - 1]:
            raise DataError(f"{path}: two columns are named {column!r}", "rename one of them")


def _open_text(path: Path, encoding: str | None, newline: str | None) -> tuple[TextIO, str]:
    """Open a text file with strict decoding. Returns the file and the encoding. Raises DataError for binary content."""
    with path.open("rb") as file:
        sample = file.read(_SAMPLE_BYTES)
    used = encoding or next((name for mark, name in _BYTE_ORDER_MARKS if sample.startswith(mark)), "utf-8-sig")
    try:
        if codecs.lookup(used).name == "utf-8":
            used = "utf-8-sig"  # utf-8-sig, so that a byte order mark does not become part of the first column's name.
        opened = path.open(encoding=used, newline=newline)
    except (LookupError, ValueError):
        raise UsageError(
            f"--encoding {encoding!r} is not a known text encoding", "give one such as utf-8 or latin-1"
        ) from None
    if seems := _seems_binary(sample, used):
        opened.close()
        raise DataError(f"{path}: is not text: {seems}", "give a text file, or correct the file's suffix")
    return opened, used


def _seems_binary(sample: bytes, encoding: str) -> str | None:
    if kind := next((kind for magic, kind in _MAGIC if sample.startswith(magic)), None):
        return f"it seems to be {kind}"
    decoder = codecs.getincrementaldecoder(encoding)
    try:
        text, valid = decoder("strict").decode(sample), True
    except UnicodeError:
        text, valid = sample.decode("latin-1"), False
    # Text has few control characters besides line ends and tabs; random bytes have 10%.
    controls = len(_C0_CONTROL.findall(text))
    if controls < 8 or controls < (0.3 if valid else 0.05) * len(text):
        return None
    if sample.count(0) > 0.4 * len(sample):
        return "it has very many NUL bytes, as UTF-16 has (then give --encoding utf-16-le)"
    return "it has very many control characters"


def _not_decodable(path: Path, encoding: str) -> DataError:
    """Return an error that names the first byte that is not ``encoding``.

    The file object's own error counts from an unknown position.
    """
    # Without "-sig" the error's position counts a byte order mark.
    encoding = encoding.removesuffix("-sig")
    decoder = codecs.getincrementaldecoder(encoding)()
    offset, line, where = 0, 1, "a part"
    with path.open("rb") as file:
        try:
            for block in iter(lambda: file.read(1 << 16), b""):
                text = decoder.decode(block)
                line, offset = line + text.count("\n"), offset + len(block)
            decoder.decode(b"", final=True)
        except UnicodeDecodeError as error:
            # The error's position starts at the bytes left over from the previous block.
            kept = len(decoder.getstate()[0])
            good = error.object[: error.start].decode(encoding, "replace")
            where = f"line {line + good.count(chr(10))}, byte offset {offset - kept + error.start},"
        except UnicodeError as error:
            where = f"line {line} ({error})"
    return DataError(
        f"{path}: {where} is not {encoding}", "pass the file's encoding, such as --encoding latin-1, cp1252 or utf-16"
    )


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
