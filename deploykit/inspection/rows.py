"""Read the other inputs of a report: columns to slice by, training rows, new rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from deploykit.data.grouping import duplicate_key
from deploykit.data.read import read_records
from deploykit.data.reading import Reading
from deploykit.data.sample import evenly
from deploykit.data.texts import scalar
from deploykit.errors import DataError
from deploykit.tasks.protocol import Task, TaskFacts
from deploykit.tasks.registry import get_task

_LEAST_NEW = 200


def read_columns(
    source: str, names: Sequence[str], *, reading: Reading, split: str
) -> Callable[[Sequence[str]], dict[str, list[str]]]:
    """Read columns to slice by, from the rows of ``source``. Returns a function from the origins of rows to their values.

    Raises DataError for a column that the rows do not have, and later for an origin that is not a row of a table.
    """
    records = {one.origin: one.values for one in read_records(source, reading, split=split)} if names else {}
    known = list(dict.fromkeys(name for values in records.values() for name in values))
    for name in names:
        if name not in known:
            raise DataError(f"{source}: has no column {name!r} to slice by", f"give one of: {', '.join(known)}")
    kept = {origin: {name: scalar(row.get(name)) or "" for name in names} for origin, row in records.items()}

    def values(origins: Sequence[str]) -> dict[str, list[str]]:
        if names and (missing := next((origin for origin in origins if origin not in kept), None)):
            raise DataError(
                f"{missing}: is not a row of a table, so it has no columns to slice by", "leave out --slice"
            )
        return {name: [kept[origin][name] for origin in origins] for name in names}

    return values


def new_texts(
    task: Task,
    facts: TaskFacts,
    source: str,
    *,
    reading: Reading,
    columns: Mapping[str, Any],
    most: int | None = None,
) -> list[str]:
    """Return the texts of new rows, labelled or not, as the stages pass them on: ``most`` of them, evenly over their order.

    Raises DataError if there are none.
    """
    if texts := _texts(task, facts, source, reading, columns):
        return texts if most is None else evenly(texts, most)
    raise DataError(f"{source}: has no text that the model can answer", "give --against new rows with texts")


def texts_against(
    facts: TaskFacts, source: str, *, reading: Reading, columns: Mapping[str, Any], measured: int
) -> list[str]:
    """Return new texts for a model that takes long to answer: at most as many as the rows that were ``measured``, or 200."""
    most = max(measured, _LEAST_NEW)
    return new_texts(get_task(facts.name), facts, source, reading=reading, columns=columns, most=most)


def seen_keys(
    task: Task, facts: TaskFacts, source: str, *, reading: Reading, columns: Mapping[str, Any]
) -> frozenset[str]:
    """Return the duplicate keys of the texts that a model was trained on."""
    return frozenset(map(duplicate_key, _texts(task, facts, source, reading, columns)))


def _texts(task: Task, facts: TaskFacts, source: str, reading: Reading, columns: Mapping[str, Any]) -> list[str]:
    own = {name: value for name, value in columns.items() if name in task.input_columns}
    rows = task.read_inputs(source, facts, reading=reading, columns=own)
    # Dialogs that contain their answers are not inputs.
    return [row.text for row in rows if row.text] or [
        text for text, _ in task.read_texts(source, facts, reading=reading, columns=own)
    ]
