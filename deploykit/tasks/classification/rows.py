"""Read rows of text and label: find their columns, and interpret their cells."""

from __future__ import annotations

import ast
import contextlib
import json
import logging
import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeGuard

from deploykit.data.read import read_records
from deploykit.data.reading import AS_FOUND, Reading
from deploykit.data.record import Record
from deploykit.data.texts import (
    LABEL_COLUMNS,
    composite_problem,
    detect_text_column,
    first_usual,
    joined,
    listed,
    peek,
    require_columns,
    scalar,
    without_dates,
)
from deploykit.errors import DataError, UsageError
from deploykit.tasks.classification.facts import LABEL_SEPARATOR, as_text
from deploykit.tasks.classification.pairs import detect_pair, paired
from deploykit.text import normalize

_LOG = logging.getLogger(__name__)
_DECIMAL = re.compile(r"[+-]?[0-9]{1,15}\.0+|[+-]?[0-9]{1,15}")
_ONE_HOT = {"0": False, "1": True, "0.0": False, "1.0": True, "false": False, "true": True}
# In a list as text: strings without a comma between them, and words with anything between them.
_JOINED_STRINGS = re.compile(r"""(?<=[\w'"])(['"])\s*(['"])(?=[\w'"])""")
_SEVERAL_WORDS = re.compile(r"\w['\"]?[\s,;]+['\"]?\w")
_INTEGER = re.compile(r"[+-]?[0-9]{1,18}")
_SPELLINGS = 8
_COMMA_NUMBER = re.compile(r"[+-]?[0-9]+(,[0-9]+)?")
_MAYBE_THOUSANDS = re.compile(r"[+-]?([1-9][0-9]{0,2}(,[0-9]{3})*|[0-9]+)")


@dataclass(frozen=True)
class Columns:
    """The columns of texts and labels in a source. Several text columns are joined, or two are a pair; several label columns
    have 0 or 1 for the label that each is named after."""

    text: tuple[str, ...]
    labels: tuple[str, ...]


@dataclass(frozen=True)
class RawExample:
    """A row as read; None is a missing text or label. ``text_pair`` is the second text of a pair. A row with a ``problem`` is
    malformed."""

    text: str | None
    label: str | None
    origin: str
    problem: str = ""
    text_pair: str | None = None


@dataclass(frozen=True)
class Example:
    """A usable row. A multi-label ``label`` is its sorted unique names joined by ``|``, "" for none.

    ``text_pair`` is the second text of a pair.
    """

    text: str
    label: str
    origin: str
    text_pair: str | None = None

    @property
    def asked(self) -> str:
        """The input of a model: the text, or the pair as one text."""
        return self.text if self.text_pair is None else as_text(self.text, self.text_pair)


def load_examples(
    source: str,
    *,
    text_columns: Sequence[str] = (),
    label_columns: Sequence[str] = (),
    prefer: Columns | None = None,
    separator: str = " ",
    pair: bool = False,
    multi_label: bool = False,
    labels: Sequence[str] = (),
    known: Collection[str] | None = (),
    label_separator: str | None = None,
    reading: Reading = AS_FOUND,
    split: str = "train",
) -> tuple[list[RawExample], Columns]:
    """Read every row of ``source`` (see ``read_records``).

    Columns not given are those of ``prefer`` where the source has them, else detected. Numbers become text: 1 and 1.0 are
    both "1". NaN, null and nested values are missing. A multi-label cell is a list of names (also written as text, as in
    "['a', 'b']"), names separated by ``label_separator`` (None: by ``|``), or a list of 0 and 1 with one for each of
    ``labels``. Several ``label_columns`` have 0 or 1 (or false and true) each. With ``pair`` two text columns are the two
    texts of a pair, and one column has pairs as JSON. Labels that differ only as 0 and 0.0 or True and true are merged, which
    is logged: they are written as in ``known``, or else as the shortest of them. ``known`` is None if labels are numbers.

    Raises:
        DataError: an unreadable source, no rows, no such column, a list where one label is wanted, lists of 0 and 1
            without ``labels``, cells with commas but no separator, a cell of several label columns that is neither 0 nor 1.
        UsageError: several label columns, and not ``multi_label``.
    """
    records = read_records(source, reading, split=split)
    records, names = peek(records, source)
    if prefer is not None:
        if not text_columns and set(label_columns).isdisjoint(prefer.text) and set(prefer.text) <= set(names):
            text_columns = prefer.text
        if not label_columns and set(prefer.labels) <= set(names) and set(prefer.labels).isdisjoint(text_columns):
            label_columns = prefer.labels
    if pair and not text_columns:
        text_columns = detect_pair(names)
    columns = detect_columns(names, text=text_columns, labels=label_columns, source=source)
    rows = [without_dates(record, (*columns.text, *columns.labels), reading) for record in records]
    if len(columns.labels) > 1:
        if not multi_label:
            raise UsageError("several --label-column are for several labels a row", "give one")
        named = [_one_hot(record, columns.labels) for record in rows]
    elif multi_label:
        where = f"column {columns.labels[0]!r}"
        cells = [_cell(record, columns.labels[0], label_separator) for record in rows]
        if width := _indicator_width(cells, labels, f"{source}: {where}"):
            named = _indicated(cells, width, labels, f"{source}: {where}")
        else:
            if label_separator is None:
                _refuse_commas(cells, f"{source}: {where}")
            named = [
                _names(cell, label_separator or LABEL_SEPARATOR, f"{record.origin}: {where}")
                for record, cell in zip(rows, cells)
            ]
    else:
        named = [_label(record, columns.labels[0]) for record in rows]
    names_found = {name for label in named for name in label or ()}
    spelled = _points_for_commas(names_found) if known is None else _one_spelling(names_found, known)
    if other := [f"{name!r} is {used!r}" for name, used in sorted(spelled.items()) if name != used]:
        what = "commas in numbers are decimal points" if known is None else "labels with the same meaning were merged"
        _LOG.warning("%s: %s: %s", source, what, ", ".join(other[:_SPELLINGS]))
    examples = []
    for record, names_of in zip(rows, named):
        label = None if names_of is None else LABEL_SEPARATOR.join(sorted({spelled[name] for name in names_of}))
        if pair:
            text, text_pair = paired(record, columns.text) or (None, None)
        else:
            text, text_pair = joined(record, columns.text, separator), None
        problem = record.problem or ("" if pair else composite_problem(record, columns.text))
        examples.append(RawExample(text, label, record.origin, problem, text_pair))
    return examples, columns


def as_example(row: RawExample, label: str) -> Example:
    """Return a row with its texts normalized and ``label``."""
    assert row.text is not None
    text_pair = None if row.text_pair is None else normalize(row.text_pair)
    return Example(normalize(row.text), label, row.origin, text_pair)


def detect_columns(
    names: Sequence[str], *, text: Sequence[str] = (), labels: Sequence[str] = (), source: str
) -> Columns:
    """Choose the columns that are not given by their usual names, in any case.

    With two columns, one of which is known, the other takes the other role. Raises DataError listing
    the columns when a given one does not exist or none can be chosen.
    """
    require_columns(text, names, source, "--text-column")
    require_columns(labels, names, source, "--label-column")
    if len(set(labels)) < len(labels):
        raise UsageError(
            f"--label-column is given twice with the same name: {', '.join(labels)}", "name each column once"
        )
    if both := next((label for label in labels if label in text), None):
        raise UsageError(f"column {both!r} is given both as text and as label", "choose another --label-column")
    if not labels and (usual := first_usual(LABEL_COLUMNS, [n for n in names if n not in text])):
        labels = (usual,)
    if not text:
        text = (detect_text_column(names, labels, source),)
    if not labels:
        rest = [n for n in names if n not in text]
        if len(names) != 2 or len(rest) != 1:
            raise DataError(f"{source}: no column is recognized as the label; {listed(names)}", "give --label-column")
        labels = rest
    return Columns(tuple(text), tuple(labels))


def sort_labels(labels: Iterable[str]) -> tuple[str, ...]:
    """Return unique labels, in numeric order if all are integers, otherwise in alphabetical order."""
    unique = sorted(set(labels))
    if all(_INTEGER.fullmatch(label) for label in unique):
        unique.sort(key=int)
    return tuple(unique)


def label_parts(label: str, *, multi_label: bool) -> tuple[str, ...]:
    """Return the names in a label: () for a multi-label row without any."""
    return tuple(label.split(LABEL_SEPARATOR) if label else ()) if multi_label else (label,)


def check_labels(examples: Sequence[Example], known: Iterable[str], source: str, *, multi_label: bool = True) -> None:
    """Raise DataError naming every label of ``examples`` not in ``known``, and the first row that has one.

    With ``multi_label`` a label that is not known as a whole is taken as names joined by ``|``.
    """
    allowed = set(known)
    first, unseen = "", Counter[str]()
    for example in examples:
        if example.label not in allowed:
            for name in label_parts(example.label, multi_label=multi_label):
                if name not in allowed:
                    first = first or example.origin
                    unseen[name] += 1
    if unseen:
        counted = ", ".join(
            f"{name!r} ({unseen[name]:,} row{'s' * (unseen[name] > 1)})" for name in sort_labels(unseen)
        )
        raise DataError(
            f"{source}: labels that no training row has: {counted}; the first is at {first}",
            f"correct the labels; training has {', '.join(map(repr, sort_labels(allowed)))}",
        )


def check_numbers(examples: Sequence[Example], source: str) -> None:
    """Raise DataError for the first label that is not a finite number."""
    for example in examples:
        try:
            finite = math.isfinite(float(example.label))
        except ValueError:
            finite = False
        if not finite:
            raise DataError(
                f"{source}: the label {example.label!r} at {example.origin} is not a number, but the model predicts numbers",
                "write it as 1234.5, or train without --regression",
            )


def validate(examples: Sequence[Example], source: str, *, multi_label: bool = False) -> None:
    """Raise DataError if no row is left, or fewer than two labels (multi-label: none)."""
    if not examples:
        raise DataError(f"{source}: no usable rows", "give rows that have a text and a label")
    labels = sort_labels({name for e in examples for name in label_parts(e.label, multi_label=multi_label)})
    if multi_label and not labels:
        raise DataError(f"{source}: no row has a label", "give rows with at least one label")
    if not multi_label and len(labels) < 2:
        raise DataError(f"{source}: every row has the label {labels[0]!r}", "a classifier needs at least two labels")


def _label(record: Record, column: str) -> tuple[str, ...] | None:
    value = record.values.get(column)
    cells = value if isinstance(value, list) else _written_list(value) or ()
    # In text, numbers in brackets may also be one label: an interval.
    if value is cells or any(isinstance(c, str) for c in cells) or (len(cells) > 1 and all(c in (0, 1) for c in cells)):
        raise DataError(f"{record.origin}: column {column!r} holds a list of labels", "give --multi-label")
    label = normalize(scalar(value) or "")
    return (label,) if label else None


def _one_hot(record: Record, columns: Sequence[str]) -> tuple[str, ...] | None:
    """Return the names of the columns that have 1; None if a cell is empty."""
    found = []
    for column in columns:
        name, cell = normalize(column), (scalar(record.values.get(column)) or "").strip().lower()
        if LABEL_SEPARATOR in name:
            raise DataError(f"column {name!r} has {LABEL_SEPARATOR!r}, which separates labels", "rename the column")
        if not cell:
            return None
        if cell not in _ONE_HOT:
            raise DataError(
                f"{record.origin}: column {column!r} has {cell!r}, and a label column of several has 0 or 1",
                "correct the row, or give another --label-column",
            )
        found += [name] if _ONE_HOT[cell] else []
    return tuple(found)


def _cell(record: Record, column: str, separator: str | None) -> object:
    """Return a multi-label cell, or the list that its text represents: '["a", "b"]', "['a', 'b']".

    Raises DataError for a text of several words in brackets that is not a list, such as NumPy's "['a' 'b']", unless a
    ``separator`` says how the cell is read.
    """
    value = record.values.get(column)
    if (written := _written_list(value)) is not None:
        return written
    if separator is None and _in_brackets(value) and _SEVERAL_WORDS.search(value):
        raise DataError(
            f"{record.origin}: column {column!r} has {value.strip()[:60]!r}, which is neither a Python nor a JSON list",
            'write ["one", "other"] or one|other; give --label-separator \'|\' if the brackets are part of a label',
        )
    return value


def _in_brackets(cell: object) -> TypeGuard[str]:
    return isinstance(cell, str) and cell.strip().startswith("[") and cell.strip().endswith("]")


def _written_list(cell: object) -> list[object] | None:
    """Return the list that a text writes in JSON or in Python."""
    if not _in_brackets(cell):
        return None
    for parse in (json.loads, ast.literal_eval):
        # Python joins the strings of "['a' 'b']".
        if parse is json.loads or not _JOINED_STRINGS.search(cell):
            with contextlib.suppress(ValueError, SyntaxError, RecursionError, MemoryError):
                parsed = parse(cell.strip())
                if isinstance(parsed, list):
                    return parsed
    return None


def _names(cell: object, separator: str, where: str) -> tuple[str, ...] | None:
    if isinstance(cell, list):
        names = [name for item in cell if (name := scalar(item)) is not None]
        if piped := next((name for name in names if LABEL_SEPARATOR in name), None):
            raise DataError(
                f"{where} has the label {piped!r}, and {LABEL_SEPARATOR!r} separates labels", "rename the label"
            )
    else:
        text = scalar(cell)
        if text is None:
            return None
        names = text.split(separator)
    return tuple(name for name in map(normalize, names) if name)


def _indicator_width(cells: Sequence[object], labels: Sequence[str], where: str) -> int:
    """Return the number of labels if the cells have a 0 or 1 for each, as in [0, 1, 0]; 0 if they have names.

    Raises DataError for lists of 0 and 1 of different lengths, and for lists of shares, such as [0.3, 0.7].
    """
    lists = [cell for cell in cells if isinstance(cell, list)]
    items = [item for cell in lists for item in cell]
    if share := next((item for item in items if isinstance(item, float) and not item.is_integer()), None):
        raise DataError(
            f"{where} holds lists of numbers such as {share}, but a row either has a label or not",
            "write 0 and 1, or names",
        )
    if not items or not all(item in (0, 1) for item in items):
        return 0
    widths = {len(cell) for cell in lists}
    # A list has each name once; [0], [1] may be the names of two labels.
    told = any(len(set(cell)) < len(cell) for cell in lists) or any(isinstance(item, bool) for item in items)
    if told and len(widths) > 1:
        raise DataError(
            f"{where} holds lists of 0 and 1 that have {', '.join(map(str, sorted(widths)))} numbers",
            "write one number for each label in every row",
        )
    (width, *others) = widths
    named = len(labels) == width and not {"0", "1"}.issuperset(labels)
    return width if not others and (told or width > 2 or (named and width > 1)) else 0


def _indicated(cells: Sequence[object], width: int, labels: Sequence[str], where: str) -> list[tuple[str, ...] | None]:
    if len(labels) != width:
        raise DataError(
            f"{where} holds lists of {width} numbers 0 and 1, one for each label"
            + (
                f", and there are {len(labels)} labels: {', '.join(labels)}" if labels else "; nothing names the labels"
            ),
            f"name them in the order of the lists: --labels {','.join(f'NAME{i}' for i in range(1, width + 1))}",
        )
    return [
        tuple(label for label, item in zip(labels, cell) if item) if isinstance(cell, list) else None for cell in cells
    ]


def _refuse_commas(cells: Sequence[object], where: str) -> None:
    """Raise DataError if commas or semicolons, and no pipe, separate names that also occur in other cells."""
    texts = {cell for cell in cells if isinstance(cell, str)}
    if any(LABEL_SEPARATOR in text for text in texts):
        return
    for used in (",", ";"):
        parts = {text: {part.strip() for part in text.split(used)} for text in sorted(texts)}
        seen = Counter(name for names in parts.values() for name in names)
        found = next(
            (text for text, names in parts.items() if len(names) > 1 and max(seen[n] for n in names) > 1), None
        )
        if found is None:
            continue
        raise DataError(
            f"{where}: no cell has {LABEL_SEPARATOR!r} between labels, and some have {used!r}: {found!r}",
            f"give --label-separator {used!r} if it stands between labels, --label-separator '|' if it is part of them",
        )


def _points_for_commas(labels: set[str]) -> dict[str, str]:
    """Return numbers with a point for the decimal comma, unless some have a point, or all commas may separate thousands."""
    decimal = all(map(_COMMA_NUMBER.fullmatch, labels)) and not all(map(_MAYBE_THOUSANDS.fullmatch, labels))
    return {label: label.replace(",", ".") if decimal else label for label in labels}


def _one_spelling(labels: set[str], known: Collection[str]) -> dict[str, str]:
    """Return one spelling for labels that mean the same: 0 for 0.0, true for True, or the ``known`` one. Others stay as
    they are."""
    by_meaning: dict[object, list[str]] = {}
    for label in sorted(labels.union(known)):
        meaning: object = label.lower() if label.lower() in ("true", "false") else label
        if _DECIMAL.fullmatch(label):
            meaning = float(label)
        by_meaning.setdefault(meaning, []).append(label)
    one = {
        meaning: min(same, key=lambda s: (s not in known, len(s), s.swapcase())) for meaning, same in by_meaning.items()
    }
    return {label: one[meaning] for meaning, same in by_meaning.items() for label in same if label in labels}
