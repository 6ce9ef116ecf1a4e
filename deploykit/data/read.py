"""Read rows from a file, a folder, a saved dataset or the Hugging Face hub, one at a time."""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from deploykit.data.delimited import check_header, find_layout, read_delimited
from deploykit.data.folders import folder_files, texts_by_folder
from deploykit.data.hub import connection_fault
from deploykit.data.open_text import COMPRESSED, is_git_lfs_pointer, plain_suffix, read_lines
from deploykit.data.packages import import_data_package
from deploykit.data.reading import AS_FOUND, Reading
from deploykit.data.record import Record, malformed
from deploykit.data.workbook import read_workbook, workbook_notes
from deploykit.errors import DataError, first_line
from deploykit.text import normalize

_BATCH = 1000
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)


def read_records(source: str, reading: Reading = AS_FOUND, *, split: str = "train") -> Iterator[Record]:
    """Stream the rows of ``source``; only a .json array and a workbook are held in memory whole.

    Args:
        source: a .csv, .tsv, .jsonl, .ndjson, .json (array of objects), .parquet or .xlsx file; a text file compressed
            (.gz, .bz2, .xz, .zst, a .zip of one file); a folder: what ``Dataset.save_to_disk`` wrote, a cloned dataset
            repository, or a folder of .txt files for each label; or the id of a dataset on the Hugging Face hub.
        reading: what is known of the file.
        split: of a dataset that has several; a file or a single dataset is read whole.

    Raises:
        DataError: the source cannot be read, or the row named in the message is malformed, and ``reading`` does not skip it.
        UsageError: an option of ``reading`` does not fit the source.
        MissingDependencyError: a package that this kind of source needs is not installed.
    """
    if os.path.isdir(source):
        yield from _folder(Path(source), split, reading)
    elif not os.path.exists(source) and not _has_known_suffix(source) and _HUB_ID.fullmatch(source):
        reading.allow(source)
        yield from _hub_dataset(source, split, reading)
    else:
        if not os.path.exists(source):
            raise DataError(f"{source}: no such file", "check the path")
        yield from _file(Path(source), reading)


def reading_notes(source: str, reading: Reading = AS_FOUND) -> list[str]:
    """Return notes for the user on how ``source`` is read: delimiter, quoting, repeated headers, sheets."""
    path = Path(source)
    if not path.is_file():
        return []
    if plain_suffix(path) == ".xlsx":
        return workbook_notes(path)
    return find_layout(path, reading).lines() if plain_suffix(path) in (".csv", ".tsv") else []


def check_file(source: str) -> None:
    """Raise DataError if ``source``, a file or two with a comma between them, is named as a file and is not there: told
    before imports that take seconds."""
    if os.path.exists(source):
        return
    for part in source.split(","):
        if _has_known_suffix(part) and not os.path.exists(part):
            raise DataError(f"{part}: no such file", "check the path")


def _has_known_suffix(source: str) -> bool:
    return Path(source).suffix.lower() in (*_READERS, *COMPRESSED)


def _file(path: Path, reading: Reading) -> Iterator[Record]:
    suffix = plain_suffix(path)
    compressed = path.suffix.lower() in COMPRESSED
    if suffix not in _READERS or (compressed and suffix in _BINARY):
        raise DataError(
            f"{path}: file type {''.join(path.suffixes[-2:]) if compressed else suffix!r} is not supported",
            f"give one of {', '.join(_READERS)} (text also as {', '.join(COMPRESSED)}), a dataset's folder, or the id of a "
            "dataset on the hub",
        )
    if suffix not in (".csv", ".tsv"):
        reading.allow(str(path), *(("no_header", "columns") if suffix == ".xlsx" else ()))
    return _READERS[suffix](path, reading)


def _folder(folder: Path, split: str, reading: Reading) -> Iterator[Record]:
    if any((folder / name).exists() for name in ("state.json", "dataset_dict.json", "dataset_info.json")):
        reading.allow(str(folder))
        yield from _saved_dataset(str(folder), split, reading)
    elif files := folder_files(folder, split, tuple(_READERS)):
        for path in files:
            yield from _file(path, reading)
    elif (texts := texts_by_folder(folder, split, reading.encoding)) is not None:
        reading.allow(str(folder))
        yield from texts
    else:
        raise DataError(
            f"{folder}: contains no data in a known format",
            "give a file, what save_to_disk wrote, a cloned dataset (data/train-….parquet), or a folder of .txt files for "
            "each label",
        )


def _jsonl(path: Path, reading: Reading) -> Iterator[Record]:
    # Only \n ends a line: JSON allows U+2028 and others inside strings.
    for number, line in enumerate(read_lines(path, reading.encoding, newline="\n"), start=1):
        if line.strip():
            origin, where = f"{normalize(path.name)}:{number}", f"line {number}"
            try:
                yield Record(origin, _object(path, _parse_json(path, line, where), where))
            except DataError as error:
                yield malformed(origin, error, reading, named=path)


def _json(path: Path, reading: Reading) -> Iterator[Record]:
    if _holds_lines(path, reading.encoding):
        yield from _jsonl(path, reading)
        return
    records = _parse_json(path, "".join(read_lines(path, reading.encoding)), "the file")
    if not isinstance(records, list):
        raise DataError(
            f"{path}: is not a JSON array", "give an array of objects; name a file with one object per line .jsonl"
        )
    for number, record in enumerate(records, start=1):
        origin = f"{normalize(path.name)}:{number}"
        try:
            yield Record(origin, _object(path, record, f"row {number}"))
        except DataError as error:
            yield malformed(origin, error, reading, named=path)


def _holds_lines(path: Path, encoding: str | None) -> bool:
    """Return whether a file named .json has an object on each of its first two lines."""
    lines = [line for line in itertools.islice(read_lines(path, encoding, newline="\n"), 100) if line.strip()][:2]
    try:
        return len(lines) == 2 and all(isinstance(json.loads(line), dict) for line in lines)
    except (ValueError, RecursionError):
        return False


def _parse_json(path: Path, text: str, where: str) -> object:
    try:
        return json.loads(text, object_pairs_hook=_object_of)
    except (ValueError, RecursionError) as error:
        remedy = "correct it, or name a file of one object a line .jsonl"
        raise DataError(f"{path}: {where} is not JSON: {error}", remedy) from None


def _object_of(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        name = next(name for i, (name, _) in enumerate(pairs) if any(name == other for other, _ in pairs[:i]))
        raise ValueError(f"an object has {name!r} twice")
    return found


def _object(path: Path, record: object, where: str) -> dict[str, object]:
    if not isinstance(record, dict):
        raise DataError(f"{path}: {where} is not a JSON object", 'write each row as {"text": ..., "label": ...}')
    return record


def _parquet(path: Path, reading: Reading) -> Iterator[Record]:
    pyarrow, parquet = import_data_package("pyarrow"), import_data_package("pyarrow.parquet")
    name, done = normalize(path.name), 0
    try:
        with parquet.ParquetFile(path) as file:
            check_header(path, file.schema_arrow.names)
            names = _class_names(file.schema_arrow.metadata)
            for batch in file.iter_batches(batch_size=_BATCH):
                for values in batch.to_pylist():
                    done += 1
                    yield _row(f"{name}:{done}", values, names, reading)
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        if is_git_lfs_pointer(path):
            raise DataError(f"{path}: is a Git LFS pointer, not the file itself", "fetch it: git lfs pull") from error
        raise DataError(f"{path}: cannot be read after row {done}: {first_line(error)}", "write it again") from error


def _class_names(metadata: Mapping[bytes, bytes] | None) -> dict[str, list[str]]:
    """Return the names behind the numbers of each ClassLabel column, as the datasets library writes them to Parquet."""
    try:
        features = json.loads((metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
    except (ValueError, KeyError, TypeError):
        return {}
    found = {}
    for column, feature in features.items():
        inner = feature.get("feature", feature) if isinstance(feature, dict) else {}
        if isinstance(inner, dict) and inner.get("_type") == "ClassLabel" and isinstance(inner.get("names"), list):
            found[column] = [str(name) for name in inner["names"]]
    return found


def _row(origin: str, values: Mapping[str, object], names: Mapping[str, list[str]], reading: Reading) -> Record:
    """Return a row with the ``names`` of its ClassLabel columns for their numbers; one without a name is malformed."""
    found = dict(values)
    for column, known in names.items():
        try:
            found[column] = _named(known, values.get(column))
        except IndexError:
            error = DataError(
                f"{origin}: column {column!r} has {values[column]!r}, and its ClassLabel has {len(known)} names: "
                f"{', '.join(known)}",
                "correct the row, or the names in the data set's features",
            )
            return malformed(origin, error, reading, named=origin)
    return Record(origin, found)


def _named(names: list[str], value: object) -> object:
    """Replace a ClassLabel's numbers, single or in a list, by names; -1 (no label) becomes None."""
    if isinstance(value, list):
        return [_named(names, item) for item in value]
    if isinstance(value, int):
        return names[value] if value >= 0 else None
    return value


_READERS: Mapping[str, Callable[[Path, Reading], Iterator[Record]]] = {
    ".csv": read_delimited,
    ".tsv": read_delimited,
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".json": _json,
    ".parquet": _parquet,
    ".xlsx": read_workbook,
}
_BINARY = (".parquet", ".xlsx")


def _saved_dataset(source: str, split: str, reading: Reading) -> Iterator[Record]:
    datasets = import_data_package("datasets")
    try:
        loaded = datasets.load_from_disk(source)
    except Exception as error:  # The exceptions for a damaged directory are not documented.
        raise DataError(
            f"{source}: is not a saved dataset: {first_line(error)}", "give a file, or what save_to_disk wrote"
        ) from error
    if isinstance(loaded, datasets.DatasetDict):
        if split not in loaded:
            raise DataError(f"{source}: has no split {split!r}", f"it has {', '.join(map(str, loaded))}")
        loaded = loaded[split]
    yield from _dataset_rows(loaded, source, reading)


def _hub_dataset(source: str, split: str, reading: Reading) -> Iterator[Record]:
    datasets = import_data_package("datasets")

    def not_loaded(reason: str) -> DataError:
        return DataError(
            f"{source}: is not a file, and its split {split!r} cannot be loaded from the hub: {reason}",
            "check the path; for a hub dataset, check its id, the split and the network. For a machine without one, run "
            f"elsewhere `hf download --repo-type dataset {source} --local-dir FOLDER`, and give that folder",
        )

    if fault := connection_fault(source, "dataset"):
        raise not_loaded(fault)
    try:
        loaded = datasets.load_dataset(source, split=split)
    except Exception as error:  # Offline, not found, gated, unknown split, wrong format: each has its own class.
        raise not_loaded(first_line(error)) from error
    yield from _dataset_rows(loaded, source, reading)


def _dataset_rows(dataset: Any, source: str, reading: Reading) -> Iterator[Record]:
    name, done = normalize(Path(source).name), 0
    features = {c: getattr(feature, "feature", feature) for c, feature in dataset.features.items()}
    names = {c: list(feature.names) for c, feature in features.items() if hasattr(feature, "int2str")}
    try:
        for batch in dataset.with_format(None).iter(batch_size=_BATCH):
            for row in zip(*batch.values()):
                done += 1
                yield _row(f"{name}:{done}", dict(zip(batch, row)), names, reading)
    except DataError:
        raise
    except Exception as error:  # Decoding a column may fail in any library.
        raise DataError(f"{source}: cannot be read after row {done}: {first_line(error)}", "save it again") from error
