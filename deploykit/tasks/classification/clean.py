"""Drop unusable rows, and count them by reason."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from deploykit.data.cleaning import cleaning_lines
from deploykit.data.grouping import duplicate_key
from deploykit.tasks.classification.facts import LABEL_SEPARATOR
from deploykit.tasks.classification.rows import Example, RawExample, as_example


@dataclass(frozen=True)
class CleaningReport:
    """Counts of rows by reason. ``rows_read`` is ``rows_kept`` plus all dropped rows.

    ``unicode_repaired`` rows had control characters, lone surrogates or text not in NFC; they are
    not dropped for it. ``joined_labels`` rows gave their label to an earlier row of the same text.
    """

    rows_read: int
    missing_text: int
    missing_label: int
    empty_text: int
    unicode_repaired: int
    exact_duplicates: int
    conflicting_duplicates: int
    rows_kept: int
    joined_labels: int = 0

    def to_json(self) -> dict[str, int]:
        return dataclasses.asdict(self)

    def lines(self) -> list[str]:
        """Return the report as text: one line for each step that affected a row."""
        dropped = (
            (self.missing_text, "without a text dropped"),
            (self.missing_label, "without a label dropped"),
            (self.empty_text, "with an empty text dropped"),
            (self.exact_duplicates, "exact duplicates dropped (first kept)"),
            (self.conflicting_duplicates, "duplicates with conflicting labels dropped"),
            (self.joined_labels, "with one more label of a text joined to its first row"),
        )
        repaired = ((self.unicode_repaired, "with repaired Unicode"),)
        return cleaning_lines(self.rows_read, dropped, repaired, self.rows_kept)


def has_label_a_row(examples: Iterable[Example]) -> bool:
    """Return whether no row of a multi-label file has two labels: then a text with two has two rows."""
    return not any(LABEL_SEPARATOR in example.label for example in examples)


def join_label_rows(examples: Sequence[Example]) -> list[Example]:
    """Join the rows of a multi-label file with one label per row: return one row per text, with all its labels.

    Other files' rows are returned as they are: duplicates are kept.
    """
    by_key: dict[str, list[Example]] = {}
    for example in examples:
        by_key.setdefault(duplicate_key(example.text), []).append(example)
    if not has_label_a_row(examples) or all(len({e.label for e in same}) == 1 for same in by_key.values()):
        return list(examples)
    return [_joined(same) for same in by_key.values()]


def _joined(same: Sequence[Example]) -> Example:
    """Return the first of the rows of one text, with the labels of all."""
    labels = {example.label for example in same} - {""}
    return dataclasses.replace(same[0], label=LABEL_SEPARATOR.join(sorted(labels)))


def clean(raw: Iterable[RawExample], *, multi_label: bool) -> tuple[list[Example], CleaningReport]:
    """Normalize the texts; drop rows without text or label, and duplicates.

    Of rows with the same text (``duplicate_key``) and label the first is kept; if the labels
    differ, none is kept, because the right one is unknown. With ``multi_label``, rows that have one label each are the labels
    of their text. The label "" is missing unless ``multi_label``.
    """
    rows_read = missing_text = missing_label = empty_text = unicode_repaired = 0
    by_key: dict[str, list[Example]] = {}
    for row in raw:
        rows_read += 1
        if row.text is None:
            missing_text += 1
        elif row.label is None or not (row.label or multi_label):
            missing_label += 1
        elif not ((example := as_example(row, row.label)).text or example.text_pair):
            empty_text += 1
        else:
            given = (row.text, row.text_pair or "")
            unicode_repaired += (example.text, example.text_pair or "") != tuple(text.strip() for text in given)
            by_key.setdefault(duplicate_key(example.asked), []).append(example)
    kept: list[Example] = []
    exact = conflicting = joined = 0
    one_each = multi_label and has_label_a_row(e for same in by_key.values() for e in same)
    for same in by_key.values():
        labels = {example.label for example in same} - {""}
        if one_each and len(labels) > 1:
            kept.append(_joined(same))
            joined += len(labels) - 1
            exact += len(same) - len(labels)
        elif all(example.label == same[0].label for example in same):
            kept.append(same[0])
            exact += len(same) - 1
        else:
            conflicting += len(same)
    return kept, CleaningReport(
        rows_read=rows_read,
        missing_text=missing_text,
        missing_label=missing_label,
        empty_text=empty_text,
        unicode_repaired=unicode_repaired,
        exact_duplicates=exact,
        conflicting_duplicates=conflicting,
        rows_kept=len(kept),
        joined_labels=joined,
    )
