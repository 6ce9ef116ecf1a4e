"""Split rows into training, validation and test, so that no text is in two of them."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from deploykit.data.grouping import group_key, require_shares
from deploykit.errors import DataError
from deploykit.tasks.classification.rows import Example, label_parts


@dataclass(frozen=True)
class Splits:
    """Rows by split; the order depends on texts and seed alone."""

    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    test: tuple[Example, ...]


def split(
    examples: Sequence[Example], *, validation: float, test: float, seed: int, multi_label: bool = True
) -> Splits:
    """Stratify by label over groups of near duplicates (``group_key``), which stay together.

    Labels are served from the rarest to the most common, each its share of every split (iterative
    stratification: Sechidis et al., ECML PKDD 2011). Every label is in training; one of three or more
    groups is in every split too, unless a group with several labels prevents it. The same rows
    in another order give the same splits. No splitter of scikit-learn keeps groups and stratifies several labels.

    Args:
        validation, test: fractions of the rows; 0 gives an empty split.
        multi_label: labels are names joined by ``|``, each stratified for itself.

    Raises:
        DataError: too few rows to fill every split and keep each label in training.
        UsageError: the fractions leave nothing to train on.
    """
    require_shares(validation, test)
    wanted = {name: share for name, share in (("validation", validation), ("test", test)) if share}
    groups = _groups(examples, seed)
    # Rows of each label in each group; a row without any label counts as one of the label "".
    rows = [
        Counter(n for e in group for n in label_parts(e.label, multi_label=multi_label) or ("",)) for group in groups
    ]
    by_label: dict[str, list[int]] = {}
    for index, counts in enumerate(rows):
        for label in counts:
            by_label.setdefault(label, []).append(index)
    left = {label: len(indices) for label, indices in by_label.items()}
    place: dict[int, str] = {}

    def give(index: int, name: str) -> bool:
        """Move a group out of training, unless it is the last one there of a label."""
        if index in place or any(left[label] < 2 for label in rows[index]):
            return False
        place[index] = name
        for label in rows[index]:
            left[label] -= 1
        return True

    def has_one(indices: Sequence[int], name: str) -> bool:
        """Return whether the split has one of these groups, now that the smallest was given if it had none."""
        return any(place.get(i) == name for i in indices) or any(
            give(i, name) for i in sorted(indices, key=lambda i: len(groups[i]))
        )

    for label, indices in sorted(by_label.items(), key=lambda item: (len(item[1]), item[0])):
        total = sum(rows[i][label] for i in indices)
        for name, share in wanted.items():
            room = round(share * total) - sum(rows[i][label] for i in indices if place.get(i) == name)
            for i in indices:
                if rows[i][label] <= room and give(i, name):
                    room -= rows[i][label]
        if len(indices) >= 3:
            for name in wanted:
                has_one(indices, name)
    for name in wanted:
        if not has_one(range(len(groups)), name):
            raise DataError(
                f"{len(examples)} rows ({len(groups)} without near duplicates, {len(by_label)} labels) are too few "
                f"for training and {' and '.join(wanted)}",
                "give more rows, or files of their own for --validation and --test",
            )
    parts: dict[str, list[Example]] = {"train": [], "validation": [], "test": []}
    for index, group in enumerate(groups):
        parts[place.get(index, "train")] += group
    if not parts["train"]:
        raise DataError("there are no rows to train on", "give more rows")
    return Splits(**{name: tuple(rows) for name, rows in parts.items()})


def drop_leaks(train: Sequence[Example], held_out: Iterable[Example]) -> tuple[list[Example], int]:
    """Return training rows without those whose ``group_key`` a held-out row has, and how many those were."""
    held = {group_key(example.asked) for example in held_out}
    kept = [example for example in train if group_key(example.asked) not in held] if held else list(train)
    return kept, len(train) - len(kept)


def _groups(examples: Sequence[Example], seed: int) -> list[list[Example]]:
    """Return examples by ``group_key``, in an order drawn by the seed that does not depend on theirs."""
    by_key: dict[str, list[Example]] = {}
    for example in examples:
        by_key.setdefault(group_key(example.asked), []).append(example)

    def drawn(key: str) -> bytes:
        return hashlib.blake2b(f"{seed}\0{key}".encode("utf-8", "surrogatepass"), digest_size=16).digest()

    return [sorted(by_key[key], key=lambda e: (e.asked, e.label, e.origin)) for key in sorted(by_key, key=drawn)]
