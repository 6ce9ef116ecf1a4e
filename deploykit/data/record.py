"""A row as it was read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from deploykit.data.reading import Reading
from deploykit.errors import DataError


@dataclass(frozen=True)
class Record:
    """A row. ``origin`` names it in messages: file and line (Parquet, datasets: row), as in "tweets.csv:17".

    One with a ``problem`` is malformed and has no values.
    """

    origin: str
    values: Mapping[str, object]
    problem: str = ""


def malformed(origin: str, error: DataError, reading: Reading, *, named: object) -> Record:
    """Return the row at ``origin`` with ``error`` as its problem, without the name of the file or row that it begins with,
    ``named``. Raises ``error`` unless ``reading`` skips such rows.
    """
    if reading.on_error == "stop":
        raise error from None
    return Record(origin, {}, error.message.removeprefix(f"{named}: "))
