"""Rows of text and label: which columns they are in, and what their cells mean."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from deploykit.data.read import Record, read_lines, read_records
from deploykit.errors import DataError, UsageError
from deploykit.runtime.text import normalize
from deploykit.tasks import LABEL_SEPARATOR

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
_INTEGER = re.compile(r"[+-]?[0-9]{1,18}")
# JSON rows may leave keys out, so the first row alone does not tell the columns.
_ROWS_FOR_COLUMNS = 100


@dataclass(frozen=True)
class Columns:
    """Where text and label stand in a source; several text columns are joined."""

    text: tuple[str, ...]
    label: str


@dataclass(frozen=True)
class RawExample:
    """A row as read; None is a missing text or label."""

    text: str | None
    label: str | None
    origin: str


@dataclass(frozen=True)
class Example:
    """A usable row. A multi-label ``label`` is its sorted unique names joined by ``|``, "" for none."""

    text: str
    label: str
    origin: str


@dataclass(frozen=True)
class TextRow:
    """A text to predict, or None and the ``problem`` that keeps it from being one."""

    origin: str
    text: str | None
    problem: str | None


def load_examples(
    source: str,
    *,
    text_columns: Sequence[str] = (),
    label_column: str | None = None,
    prefer: Columns | None = None,
    separator: str = " ",
    multi_label: bool = False,
    encoding: str | None = None,
    split: str = "train",
) -> tuple[list[RawExample], Columns]:
    """Read every row of ``source`` (see ``read_records``); columns not given are those of ``prefer`` where the source has them, else detected.

    Numbers become text: 1 and 1.0 are both "1". NaN, null and nested values are missing. A
    multi-label cell is a list of names, or names separated by ``|`` and nothing else.

    Raises:
        DataError: an unreadable source, no rows, no such column, a list where one label is wanted.
    """
    records = read_records(source, encoding=encoding, split=split)
    records, names = _peek(records, source)
    if prefer is not None:
        taken = {*text_columns, label_column}
        if not text_columns and taken.isdisjoint(prefer.text) and set(prefer.text) <= set(names):
            text_columns = prefer.text
        if label_column is None and prefer.label in names and prefer.label not in text_columns:
            label_column = prefer.label
    columns = detect_columns(names, text=text_columns, label=label_column, source=source)
    examples = [
        RawExample(
            _joined(record, columns.text, separator),
            _label(record, columns.label, multi_label=multi_label),
            record.origin,
        )
        for record in records
    ]
    return examples, columns


def read_texts(
    source: str,
    columns: Sequence[str] | None = None,
    separator: str = " ",
    *,
    encoding: str | None = None,
    split: str = "train",
) -> Iterator[TextRow]:
    """Stream the normalized texts of ``source``, or of a .txt file with one text a line.

    Every row is yielded, so that answers can be put beside rows. Raises as ``load_examples``.
    """
    if Path(source).suffix.lower() == ".txt":
        name = normalize(Path(source).name)
        for number, line in enumerate(read_lines(Path(source), encoding), start=1):
            yield _text_row(f"{name}:{number}", line)
        return
    records, names = _peek(read_records(source, encoding=encoding, split=split), source)
    if columns:
        _require(columns, names, source, "--text-column")
    used = tuple(columns or ()) or (_detect_text(names, None, source),)
    for record in records:
        yield _text_row(record.origin, _joined(record, used, separator))


def detect_columns(names: Sequence[str], *, text: Sequence[str] = (), label: str | None = None, source: str) -> Columns:
    """Choose the columns that are not given by their usual names, in any case.

    With two columns, one of which is known, the other takes the other role. Raises DataError listing
    the columns when a given one does not exist or none can be chosen.
    """
    _require(text, names, source, "--text-column")
    _require([label] if label is not None else [], names, source, "--label-column")
    if label is not None and label in text:
        raise UsageError(f"column {label!r} is given as text and as label", "choose another --label-column")
    if label is None:
        label = _usual(LABEL_COLUMNS, [n for n in names if n not in text])
    if not text:
        text = (_detect_text(names, label, source),)
    if label is None:
        rest = [n for n in names if n not in text]
        if len(names) != 2 or len(rest) != 1:
            raise DataError(f"{source}: no column is recognized as the label; {_listed(names)}", "give --label-column")
        label = rest[0]
    return Columns(tuple(text), label)


def sort_labels(labels: Iterable[str]) -> tuple[str, ...]:
    """Unique labels, in numeric order if all are integers, otherwise in alphabetical order."""
    unique = sorted(set(labels))
    if all(_INTEGER.fullmatch(label) for label in unique):
        unique.sort(key=int)
    return tuple(unique)


def label_parts(label: str, *, multi_label: bool) -> tuple[str, ...]:
    """The names in a label: () for a multi-label row without any."""
    return tuple(label.split(LABEL_SEPARATOR) if label else ()) if multi_label else (label,)


def check_labels(examples: Sequence[Example], known: Iterable[str], source: str, *, multi_label: bool = True) -> None:
    """Raise DataError naming every label of ``examples`` not in ``known``, and the first row that has one.

    With ``multi_label`` a label that is not known as a whole is taken as names joined by ``|``.
    """
    allowed = set(known)
    unseen: dict[str, str] = {}
    for example in examples:
        if example.label not in allowed:
            for name in label_parts(example.label, multi_label=multi_label):
                if name not in allowed:
                    unseen.setdefault(name, example.origin)
    if unseen:
        raise DataError(
            f"{source}: labels that no training row has: {', '.join(map(repr, sort_labels(unseen)))}; "
            f"the first is at {next(iter(unseen.values()))}",
            f"correct the labels; training has {', '.join(map(repr, sort_labels(allowed)))}",
        )


def validate(examples: Sequence[Example], source: str, *, multi_label: bool = False) -> None:
    """Raise DataError when no row is left, or too few labels to tell apart (multi-label: none)."""
    if not examples:
        raise DataError(f"{source}: no usable rows", "give rows that have a text and a label")
    labels = sort_labels({name for e in examples for name in label_parts(e.label, multi_label=multi_label)})
    if multi_label and not labels:
        raise DataError(f"{source}: no row has a label", "give rows with at least one label")
    if not multi_label and len(labels) < 2:
        raise DataError(f"{source}: every row has the label {labels[0]!r}", "a classifier needs at least two labels")


def _peek(records: Iterator[Record], source: str) -> tuple[Iterator[Record], list[str]]:
    """The records again, and the columns that the first of them have."""
    head = list(itertools.islice(records, _ROWS_FOR_COLUMNS))
    if not head:
        raise DataError(f"{source}: has no rows", "give a file with rows")
    return itertools.chain(head, records), list(dict.fromkeys(name for record in head for name in record.values))


def _require(given: Sequence[str], names: Sequence[str], source: str, option: str) -> None:
    for name in given:
        if name not in names:
            raise DataError(f"{source}: has no column {name!r}; {_listed(names)}", f"give {option} one of these")


def _detect_text(names: Sequence[str], label: str | None, source: str) -> str:
    rest = [n for n in names if n != label]
    found = _usual(TEXT_COLUMNS, rest)
    if found is None and len(names) <= 2:
        other = label or _usual(LABEL_COLUMNS, names)
        rest = [n for n in names if n != other]
        found = rest[0] if len(rest) == 1 and (other or len(names) == 1) else None
    if found is None:
        raise DataError(f"{source}: no column is recognized as the text; {_listed(names)}", "give --text-column")
    return found


def _usual(usual: Sequence[str], names: Sequence[str]) -> str | None:
    by_lower = {name.lower(): name for name in reversed(names)}
    return next((by_lower[name] for name in usual if name in by_lower), None)


def _listed(names: Sequence[str]) -> str:
    return f"its columns are {', '.join(map(repr, names))}"


def _text_row(origin: str, text: str | None) -> TextRow:
    if text is None:
        return TextRow(origin, None, "the text is missing")
    text = normalize(text)
    return TextRow(origin, text, None) if text else TextRow(origin, None, "the text is empty")


def _joined(record: Record, columns: Sequence[str], separator: str) -> str | None:
    present = [text for column in columns if (text := _scalar(record.values.get(column))) is not None]
    return separator.join(text for text in present if text.strip()) if present else None


def _label(record: Record, column: str, *, multi_label: bool) -> str | None:
    value = record.values.get(column)
    if not multi_label:
        if isinstance(value, list):
            raise DataError(f"{record.origin}: column {column!r} holds a list of labels", "give --multi-label")
        return normalize(_scalar(value) or "") or None
    if isinstance(value, list):
        cells = [cell for item in value if (cell := _scalar(item)) is not None]
        if piped := next((cell for cell in cells if LABEL_SEPARATOR in cell), None):
            raise DataError(
                f"{record.origin}: column {column!r} has the label {piped!r}, and {LABEL_SEPARATOR!r} separates labels",
                "rename the label",
            )
    else:
        text = _scalar(value)
        if text is None:
            return None
        cells = text.split(LABEL_SEPARATOR)
    return LABEL_SEPARATOR.join(sorted({normalize(cell) for cell in cells} - {""}))


def _scalar(value: object) -> str | None:
    """A cell as text; None for what is missing or not a single value."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float) and value == value:
        # A column of integers with gaps is stored as float by pandas.
        return str(int(value)) if value.is_integer() else str(value)
    return None
