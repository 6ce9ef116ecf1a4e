"""Describe the cleaning of rows."""

from __future__ import annotations

from collections.abc import Iterable

Counted = Iterable[tuple[int, str]]
"""Numbers of rows, each with the reason or step that it counts."""


def cleaning_lines(read: int, dropped: Counted, changed: Counted, kept: int) -> list[str]:
    """Return a line for each step that affected a row, between those of the rows read and kept."""
    return [
        f"{read:,} rows read",
        *(f"  - {count:>8,} {what}" for count, what in dropped if count),
        *(f"    {count:>8,} {what}" for count, what in changed if count),
        f"{kept:,} rows kept",
    ]
