"""Which parts stay in fp32: the fewest that hold the limit, most sensitive first."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from deploykit.errors import ExportError
from deploykit.export.search import fewest_in_fp32

PARTS = [f"part{i}" for i in range(24)]


@pytest.mark.parametrize("needed", [1, 2, 3, 5, 8, 11, 12])
def test_the_fewest_parts_that_hold_the_limit_are_found(needed: int) -> None:
    written: list[list[str]] = []

    def drop(kept: Sequence[str]) -> float:
        written.append(list(kept))
        return 0.0 if len(kept) >= needed else 9.0

    found = fewest_in_fp32(PARTS, drop, 0.5, say=lambda line: None)
    assert list(found.kept) == PARTS[:needed]
    assert written[-1] == PARTS[:needed], "what was written last is the result"
    assert len(found.trials) <= 8
    assert {trial.kept: trial.drop for trial in found.trials}[needed] == 0.0


def test_a_limit_that_half_of_the_model_in_fp32_does_not_hold_is_an_error() -> None:
    with pytest.raises(ExportError, match=r"loses 2\.00 points, more than 0\.5, even with 12 of 24 parts"):
        fewest_in_fp32(PARTS, lambda kept: 2.0, 0.5, say=lambda line: None)


def test_what_was_measured_is_told() -> None:
    lines: list[str] = []
    fewest_in_fp32(PARTS, lambda kept: 0.7 - 0.1 * len(kept), 0.5, say=lines.append)
    assert lines == [
        "with 1 of 24 parts in fp32 it loses 0.60 points",
        "with 2 of 24 parts in fp32 it loses 0.50 points",
    ]
