"""Read parallel text, and texts to translate, from every supported file type."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from deploykit.data.open_text import ROW_ENDS, plain_suffix, read_lines
from deploykit.data.read import read_records
from deploykit.data.reading import AS_FOUND, Reading
from deploykit.data.record import Record
from deploykit.data.texts import TEXT_COLUMNS, TextRow, is_text_file, peek, scalar, text_lines, without_dates
from deploykit.errors import DataError, UsageError
from deploykit.tasks.translation.catalogs import CATALOGS, read_catalog, read_catalog_sources
from deploykit.tasks.translation.languages import closest, distance
from deploykit.tasks.translation.pairs import PairColumns, RawPair, one_line
from deploykit.tasks.translation.tmx import read_tmx
from deploykit.text import normalize

# "1" and "2" name the columns of a table without a header.
SOURCE_COLUMNS = ("source", "src", "source_text", "src_text", "source_sentence", "original", "1")
TARGET_COLUMNS = ("target", "tgt", "trg", "target_text", "tgt_text", "target_sentence", "translation", "reference", "2")
_TABLES = (".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".parquet", ".xlsx")


def load_pairs(
    path: str,
    *,
    source: str,
    target: str,
    source_column: str | None = None,
    target_column: str | None = None,
    prefer: PairColumns | None = None,
    reading: Reading = AS_FOUND,
    split: str = "train",
) -> tuple[list[RawPair], PairColumns]:
    """Read every row of ``path``, with texts in the languages ``source`` and ``target`` (codes).

    ``path`` is one of
    - anything that ``read_records`` reads. Columns not given are those of ``prefer`` if the table has them, else
      detected by language ("en", "eng_Latn", "sentence_en", "French") or role ("source", "src"). The fields of a
      nested cell are columns too: ``translation.en``.
    - a .tsv without a header, as parallel corpora often are: its first line has two fields that do not name both
      columns (or columns are given by number: "1", "2"). Quotes are then plain characters, and each line is a row.
    - a .tmx, .po or .mo file.
    - two text files with a text per line: "a.txt,b.txt", or "corpus" for corpus.en and corpus.fr.

    Raises:
        DataError: unreadable, no rows, no such column, text files of unequal length.
        UsageError: one column is given for both sides.
    """
    suffix = Path(path).suffix.lower()
    if suffix == ".tmx" or suffix in CATALOGS:
        reading.allow(path)
    if files := _paired_files(path, source, target):
        rows: Iterable[RawPair] = _paired_lines(*files, reading)
        columns = PairColumns(source, target)
    elif suffix == ".tmx":
        name = normalize(Path(path).name)
        units = read_tmx(_existing(path), (source, target), reading.encoding)
        rows = (RawPair(unit.texts[0], unit.texts[1], f"{name}:{unit.line}", None, unit.inline_codes) for unit in units)
        columns = PairColumns(source, target)
    elif suffix in CATALOGS:
        rows = read_catalog(_existing(path), target, reading.encoding)
        columns = PairColumns("msgid", "msgstr")
    else:
        if Path(path).is_file() and plain_suffix(Path(path)) not in _TABLES:
            raise DataError(
                f"{path}: files of type {suffix!r} are not read as pairs",
                f"give one of {', '.join(_TABLES)}, .tmx, .po, .mo, or two text files: source.txt,target.txt",
            )
        preferred = (prefer.source, prefer.target) if prefer else ()
        given = (source_column, target_column)
        records, names = _table(path, given, preferred, (source, target), reading, split)
        if prefer is not None:
            source_column = source_column or _preferred(prefer.source, target_column, names)
            target_column = target_column or _preferred(prefer.target, source_column, names)
        columns = detect_pair_columns(
            names, source=source, target=target, source_column=source_column, target_column=target_column, path=path
        )
        rows = (
            RawPair(
                scalar(record.values.get(columns.source)), scalar(record.values.get(columns.target)), record.origin,
                problem=record.problem,
            )
            for record in (without_dates(found, (columns.source, columns.target), reading) for found in records)
        )  # fmt: skip
    pairs = list(rows)
    if not pairs:
        raise DataError(f"{path}: has no rows", "give a file with rows")
    return pairs, columns


def read_sources(
    path: str,
    *,
    column: str | None = None,
    source: str,
    prefer: str | None = None,
    reading: Reading = AS_FOUND,
    split: str = "train",
) -> Iterator[TextRow]:
    """Stream the texts to translate, in the language ``source``, their line breaks kept.

    Every row is yielded, so that answers match rows: an empty one as an empty text, a missing one with its problem. A
    row is a line of a .txt file (ended by ``\\n``), a row of a table (column given, ``prefer``, or detected as by
    ``load_pairs``), a msgid or msgid_plural of a catalog that is not obsolete, or a unit of a TMX file. Raises as
    ``load_pairs``.
    """
    suffix = Path(path).suffix.lower()
    lines = is_text_file(path)
    if suffix == ".tmx" or suffix in CATALOGS:
        reading.allow(path)
    if lines:
        texts: Iterable[tuple[str, str | None]] = text_lines(str(_existing(path)), reading)
    elif suffix == ".tmx":
        name = normalize(Path(path).name)
        texts = (
            (f"{name}:{unit.line}", unit.texts[0]) for unit in read_tmx(_existing(path), (source,), reading.encoding)
        )
    elif suffix in CATALOGS:
        texts = read_catalog_sources(_existing(path), reading.encoding)
    else:
        records, names = _table(path, (column,), (prefer,), (source,), reading, split)
        used = column or (prefer if prefer in names else None) or _source_column(names, source, path)
        _require(used, names, path, "--source-column")
        yield from (_source_row(without_dates(record, (used,), reading), used) for record in records)
        return
    clean = one_line if lines else normalize  # what the reader of lines left in one is no line break
    for origin, text in texts:
        yield TextRow(origin, None, "the text is missing") if text is None else TextRow(origin, clean(text), None)


def _source_row(record: Record, column: str) -> TextRow:
    text = scalar(record.values.get(column))
    if text is None:
        return TextRow(record.origin, None, record.problem or "the text is missing")
    return TextRow(record.origin, normalize(text), None)


def detect_pair_columns(
    names: Sequence[str],
    *,
    source: str,
    target: str,
    source_column: str | None = None,
    target_column: str | None = None,
    path: str,
) -> PairColumns:
    """Choose the columns that are not given, both by the same kind of name if possible.

    Of two columns, if one is known the other has the other role. Raises DataError listing the columns if a given one
    does not exist or none can be chosen.
    """
    _require(source_column, names, path, "--source-column")
    _require(target_column, names, path, "--target-column")
    if source_column is not None and source_column == target_column:
        raise UsageError(f"column {source_column!r} is given as source and as target", "choose another --target-column")
    sources = [source_column] * 4 if source_column else _candidates(names, source, SOURCE_COLUMNS, target_column)
    targets = [target_column] * 4 if target_column else _candidates(names, target, TARGET_COLUMNS, source_column)
    # Prefer the same kind of name ("id" may be Indonesian, or a number beside "source" and "target").
    found = next(((s, t) for s, t in zip(sources, targets) if s and t and s != t), None)
    if found is None:
        one, other = (next((name for name in side if name), None) for side in (sources, targets))
        if len(names) == 2 and bool(one) != bool(other):
            rest = next(name for name in names if name != (one or other))
            one, other = one or rest, other or rest
        if one is None or other is None or one == other:
            side, option = ("target", "--target-column") if one and not other else ("source", "--source-column")
            both = "--source-column and --target-column" if one == other else option
            raise DataError(
                f"{path}: no column is recognized as the {side} ({source} to {target}); {_listed(names)}",
                f"give {both}",
            )
        found = one, other
    return PairColumns(*found)


def _candidates(names: Sequence[str], code: str, usual: Sequence[str], other: str | None) -> list[str | None]:
    """Return the column by each kind of name: the language's code, another code or name, a part of a name, the role."""
    names = [name for name in names if name != other]
    by_lower = {name.lower(): name for name in reversed(names)}
    exact = next((name for name in names if _plain(name) == _plain(code)), None)
    by_part = {name: far for name in names if (far := _language_part(name, code)) is not None}
    nearest = [name for name in by_part if by_part[name] == min(by_part.values())]
    # With two columns of a language (title_en, text_en) the user must choose.
    part = nearest[0] if len(nearest) == 1 else None
    return [exact, closest(code, names), part, next((by_lower[name] for name in usual if name in by_lower), None)]


def _language_part(name: str, code: str) -> int | None:
    """Return the ``distance`` of the language that the name begins or ends with; None if it is another or none."""
    words = re.split(r"[^A-Za-z0-9]+", name)
    ends = [(words[i:], words[:i]) for i in range(1, len(words))]
    found = [d for pair in ends for part in pair if (d := distance(code, "_".join(part))) is not None]
    return min(found, default=None)


def _plain(code: str) -> str:
    return code.lower().replace("-", "_")


def _source_column(names: Sequence[str], source: str, path: str) -> str:
    found = next((name for name in _candidates(names, source, (*SOURCE_COLUMNS, *TEXT_COLUMNS), None) if name), None)
    if found is None and len(names) == 1:
        found = names[0]
    if found is None:
        raise DataError(
            f"{path}: no column is recognized as the source ({source}); {_listed(names)}", "give --source-column"
        )
    return found


def _preferred(column: str, other: str | None, names: Sequence[str]) -> str | None:
    return column if column in names and column != other else None


def _require(given: str | None, names: Sequence[str], path: str, option: str) -> None:
    if given is not None and given not in names:
        raise DataError(f"{path}: has no column {given!r}; {_listed(names)}", f"give {option} one of these")


def _listed(names: Sequence[str]) -> str:
    return f"its columns are {', '.join(map(repr, names))}"


def _table(
    path: str,
    given: Sequence[str | None],
    preferred: Sequence[str | None],
    languages: Sequence[str],
    reading: Reading,
    split: str,
) -> tuple[Iterator[Record], list[str]]:
    """Return records with nested fields as additional columns, and the columns that the first of them have."""
    if not reading.is_table and plain_suffix(Path(path)) == ".tsv" and Path(path).is_file():
        first = next((line for line in read_lines(Path(path), reading.encoding, newline=ROW_ENDS) if line.strip()), "")
        if _has_no_header(first, given, preferred, languages):
            reading = replace(reading, delimiter="\t", quoting="none", no_header=True)
    records = (Record(r.origin, _flat(r.values), r.problem) for r in read_records(path, reading, split=split))
    return peek(records, path)


def _has_no_header(
    first: str, given: Sequence[str | None], preferred: Sequence[str | None], languages: Sequence[str]
) -> bool:
    names = [cell.strip().strip('"') for cell in first.split("\t")]
    named = [name for name in given if name is not None]
    if any(name in names for name in (*named, *preferred)) or not all(name.isdecimal() for name in named):
        return False
    if named:
        return len(names) > 1
    sides = [(*SOURCE_COLUMNS, *TEXT_COLUMNS), TARGET_COLUMNS]
    if all(any(_candidates(names, code, usual, None)) for code, usual in zip(languages, sides)):
        return False
    return len(names) == 2 or (len(names) > 2 and bool(preferred) and all(n and n.isdecimal() for n in preferred))


def _flat(values: Mapping[str, object]) -> Mapping[str, object]:
    nested = {f"{name}.{key}": v for name, cell in values.items() if isinstance(cell, dict) for key, v in cell.items()}
    return {**{k: v for k, v in values.items() if not isinstance(v, dict)}, **nested} if nested else values


def _paired_files(path: str, source: str, target: str) -> tuple[Path, Path] | None:
    """Return the two text files that ``path`` names, or None if it names something else."""
    if os.path.exists(path) and not os.path.isdir(path):
        return None
    if "," in path:
        files = [Path(part) for part in path.split(",")]
        if missing := next((file for file in files if not file.is_file()), None):
            raise DataError(f"{missing}: no such file", "check the path")
        if len(files) != 2:
            raise DataError(f"{path}: names {len(files)} files", "give a source and a target file: a.txt,b.txt")
        return files[0], files[1]
    prefix = Path(path)
    beside = [f for f in prefix.parent.glob(f"{_escaped(prefix.name)}.*") if f.is_file()] if prefix.name else []
    by_code = {file.name[len(prefix.name) + 1 :]: file for file in sorted(beside)}
    found = [closest(code, [code] * (code in by_code) or by_code) for code in (source, target)]
    if found[0] is None or found[1] is None or found[0] == found[1]:
        if any(found) and not os.path.isdir(path) and found[0] != found[1]:
            there, lacks = (found[0], target) if found[0] else (found[1], source)
            raise DataError(
                f"{path}.{lacks}: no such file, and {path}.{there} is there", "give both, or name them: a,b"
            )
        return None
    return by_code[found[0]], by_code[found[1]]


def _escaped(name: str) -> str:
    return re.sub(r"([\[*?])", r"[\1]", name)


def _paired_lines(source: Path, target: Path, reading: Reading) -> Iterator[RawPair]:
    counts = [0, 0]
    files = (text_lines(str(file), reading) for file in (source, target))
    for one, other in itertools.zip_longest(*files, fillvalue=("", None)):
        counts = [counts[0] + (one[1] is not None), counts[1] + (other[1] is not None)]
        yield RawPair(one[1], other[1], one[0] or other[0])
    if counts[0] != counts[1]:
        raise DataError(
            f"{source} has {counts[0]:,} lines and {target} has {counts[1]:,}",
            "line n of one must be the translation of line n of the other; find the first line that does not match",
        )


def _existing(path: str) -> Path:
    if not Path(path).is_file():
        raise DataError(f"{path}: no such file", "check the path")
    return Path(path)
