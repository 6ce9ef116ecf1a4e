"""Rows of text and label: which columns they are in, and what their cells mean."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from deploykit.data.read import read_records
from deploykit.data.record import Record
from deploykit.data.texts import (
    LABEL_COLUMNS,
    detect_text_column,
    first_usual,
    joined,
    listed,
    peek,
    require_columns,
    scalar,
)
from deploykit.errors import DataError, UsageError
from deploykit.tasks.classification.facts import LABEL_SEPARATOR
from deploykit.text import normalize

_INTEGER = re.compile(r"[+-]?[0-9]{1,18}")


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
    records, names = peek(records, source)
    if prefer is not None:
        taken = {*text_columns, label_column}
        if not text_columns and taken.isdisjoint(prefer.text) and set(prefer.text) <= set(names):
            text_columns = prefer.text
        if label_column is None and prefer.label in names and prefer.label not in text_columns:
            label_column = prefer.label
    columns = detect_columns(names, text=text_columns, label=label_column, source=source)
    examples = [
        RawExample(
            joined(record, columns.text, separator),
            _label(record, columns.label, multi_label=multi_label),
            record.origin,
        )
        for record in records
    ]
    return examples, columns


def detect_columns(names: Sequence[str], *, text: Sequence[str] = (), label: str | None = None, source: str) -> Columns:
    """Choose the columns that are not given by their usual names, in any case.

    With two columns, one of which is known, the other takes the other role. Raises DataError listing
    the columns when a given one does not exist or none can be chosen.
    """
    require_columns(text, names, source, "--text-column")
    require_columns([label] if label is not None else [], names, source, "--label-column")
    if label is not None and label in text:
        raise UsageError(f"column {label!r} is given as text and as label", "choose another --label-column")
    if label is None:
        label = first_usual(LABEL_COLUMNS, [n for n in names if n not in text])
    if not text:
        text = (detect_text_column(names, label, source),)
    if label is None:
        rest = [n for n in names if n not in text]
        if len(names) != 2 or len(rest) != 1:
            raise DataError(f"{source}: no column is recognized as the label; {listed(names)}", "give --label-column")
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


def _label(record: Record, column: str, *, multi_label: bool) -> str | None:
    value = record.values.get(column)
    if not multi_label:
        if isinstance(value, list):
            raise DataError(f"{record.origin}: column {column!r} holds a list of labels", "give --multi-label")
        return normalize(scalar(value) or "") or None
    if isinstance(value, list):
        cells = [cell for item in value if (cell := scalar(item)) is not None]
        if piped := next((cell for cell in cells if LABEL_SEPARATOR in cell), None):
            raise DataError(
                f"{record.origin}: column {column!r} has the label {piped!r}, and {LABEL_SEPARATOR!r} separates labels",
                "rename the label",
            )
    else:
        text = scalar(value)
        if text is None:
            return None
        cells = text.split(LABEL_SEPARATOR)
    return LABEL_SEPARATOR.join(sorted({normalize(cell) for cell in cells} - {""}))
