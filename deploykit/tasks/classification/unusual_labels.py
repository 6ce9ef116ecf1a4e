"""Warn of unusual labels in training rows: blanks written as words, spellings, numbers, labels with few rows."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from deploykit.errors import DataError

_BLANK = frozenset(("none", "null", "nil", "nan", "nat", "n/a", "na", "#n/a", "<na>", "-", "?"))
_NUMBER = re.compile(r"[+-]?[0-9]+([.,][0-9]+)?")
_MANY_LABELS = 20
_ROWS_OF_A_SPLIT = 3
"""A label with fewer rows cannot be in training, validation and test."""
_SHOWN = 5


def label_doubts(labels: Iterable[str]) -> list[str]:
    """Return a line for each doubt about the labels of the rows; each row has one label."""
    counts = Counter(labels)
    spelled: dict[str, dict[str, int]] = {}
    for label, count in sorted(counts.items()):
        spelled.setdefault(" ".join(label.casefold().split()), {})[label] = count
    found = []
    if blank := {label: count for label, count in counts.items() if label.casefold() in _BLANK}:
        found.append(f"{_counted(blank)} will be learned as labels; leave these rows out if they have none")
    if alike := [same for same in spelled.values() if len(same) > 1]:
        pairs = "; ".join(_counted(same) for same in alike[:_SHOWN])
        found.append(
            f"labels that differ in case or spaces are different labels: {pairs}; write them alike if they are one"
        )
    if len(counts) >= _MANY_LABELS and all(map(_NUMBER.fullmatch, counts)):
        found.append(f"{len(counts):,} numbers will be learned as labels; --regression learns their size")
    if lone := {label: count for label, count in counts.items() if count < _ROWS_OF_A_SPLIT}:
        found.append(f"too few rows to be trained and measured on: {_counted(lone)}")
    return found


def refuse_lone_labels(labels: Sequence[str], source: str, columns: Sequence[str]) -> None:
    """Raise DataError if most rows have a label that no other row has, as with numbers and names that are not classes."""
    counts = Counter(labels)
    lone = sum(count == 1 for count in counts.values())
    if len(counts) >= _MANY_LABELS and lone > len(labels) / 2:
        raise DataError(
            f"{source}: column {', '.join(map(repr, columns))} has {len(counts):,} labels in {len(labels):,} rows, and "
            f"{lone:,} of them have one row each",
            "name the column of the classes: --label-column NAME; learn numbers with --regression; if these are classes, name "
            "all of them with --labels",
        )


def _counted(counts: Mapping[str, int]) -> str:
    """Return labels with their rows, as 'a' (2 rows), 'b' (1 row); the most frequent ones first."""
    most = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    shown = ", ".join(f"{label!r} ({count:,} row{'s' * (count > 1)})" for label, count in most[:_SHOWN])
    return shown + (f" and {len(most) - _SHOWN:,} more" if len(most) > _SHOWN else "")
