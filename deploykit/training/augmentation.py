"""Show the noisy copies of training rows, and drop those that are held out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from deploykit.data.sample import evenly
from deploykit.training.rows import Say

Row = TypeVar("Row")
_SHOWN = 2
"""Copies of each noise that are shown."""


def usable_copies(
    copies: Mapping[str, Sequence[Row]],
    without_leaks: Callable[[Sequence[Row]], tuple[list[Row], int]],
    shown: Callable[[Row], str],
    say: Say,
) -> dict[str, list[Row]]:
    """Return noise -> its copies without those that ``without_leaks`` drops because their text is held out.

    Prints their number, and some of them as ``shown`` writes them.
    """
    found = {}
    for noise, rows in copies.items():
        found[noise], leaks = without_leaks(rows)
        told = f", {leaks:,} dropped: the same text is held out" if leaks else ""
        say(f"{noise}: {len(found[noise]):,} copies of training rows{told}")
        for row in evenly(found[noise], _SHOWN):
            say(f"  {shown(row)}")
    return found
