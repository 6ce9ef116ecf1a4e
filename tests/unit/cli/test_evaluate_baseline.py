"""Two models side by side: on the same rows only."""

from __future__ import annotations

import pytest

from deploykit.cli.evaluate import _check_same_rows
from deploykit.errors import DataError
from deploykit.tasks.types import Evaluation
from deploykit.text_table import stacked


def test_a_row_that_one_model_alone_refuses_is_named() -> None:
    both = "rows.csv:3: the label is missing"
    long = ("rows.csv:7: has 300 tokens, the context is 256", "rows.csv:7: has 310 tokens, the context is 256")
    _check_same_rows("a", Evaluation({}, 5, (both, long[0])), "b", Evaluation({}, 5, (both, long[1])))
    with pytest.raises(DataError, match=r"^rows\.csv:7: only one of a and b takes this row"):
        _check_same_rows("a", Evaluation({}, 6, (both,)), "b", Evaluation({}, 5, (both, long[1])))


def test_tables_that_are_no_columns_stand_one_below_another() -> None:
    assert stacked({"a": "1", "b": "2"}) == "a\n1\n\nb\n2"
    assert stacked({"": "1"}) == "1"
