"""Gaps between the groups that a column names."""

from __future__ import annotations

import numpy as np
import pytest

from deploykit.tasks.classification.facts import Classification
from deploykit.tasks.classification.inspection.groups import group_gaps

TASK = Classification(("no", "yes"), max_length=8, pad_token_id=0)


def test_gaps_are_those_that_fairlearn_defines() -> None:
    # Group a: 20 rows, 10 of them yes; it gets yes 10 times, 8 of them right. Group b: 20 rows, 10 yes; yes 4 times, all right.
    true = np.array(([1] * 10 + [0] * 10) * 2, bool)
    given = np.array([1] * 8 + [0] * 2 + [1] * 2 + [0] * 8 + [1] * 4 + [0] * 16, np.float32)
    truth = np.stack([~true, true], axis=1)
    [found] = group_gaps(TASK, truth, np.stack([1 - given, given], axis=1), {"sex": ["a"] * 20 + ["b"] * 20})
    assert (found["column"], found["label"]) == ("sex", "yes")
    assert found["rates"] == pytest.approx({"sex: a": 0.5, "sex: b": 0.2})
    assert found["demographic_parity"] == pytest.approx(0.3)
    assert found["equalized_odds"] == pytest.approx(0.4), "of the yes rows 0.8 and 0.4, of the others 0.2 and 0"
    low, high = found["intervals"]["equalized_odds"]
    assert low < 0.4 < high


def test_a_group_of_few_rows_is_left_out() -> None:
    truth = np.eye(2, dtype=bool)[[0, 1] * 12]
    assert group_gaps(TASK, truth, truth.astype(np.float32), {"sex": ["a"] * 20 + ["b"] * 4}) == []
