"""A row as it was read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Record:
    """A row. ``origin`` names it in messages: file and line (Parquet, datasets: row), as in "tweets.csv:17"."""

    origin: str
    values: Mapping[str, object]
