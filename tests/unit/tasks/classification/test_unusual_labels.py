import logging

import pytest

from deploykit.errors import DataError
from deploykit.tasks.classification.rows import load_examples
from deploykit.tasks.classification.unusual_labels import label_doubts, refuse_lone_labels


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        (["good"] * 5 + ["None"] * 4 + ["N/A"] * 3, "'None' (4 rows), 'N/A' (3 rows) will be learned as labels"),
        (["Good"] * 5 + ["good"] * 4, "different labels: 'Good' (5 rows), 'good' (4 rows)"),
        (["very good"] * 5 + ["very  Good"] * 4, "different labels: 'very good' (5 rows), 'very  Good' (4 rows)"),
        ([str(number % 20) for number in range(100)], "20 numbers will be learned as labels; --regression"),
        (["a", "a", "a", "b"], "too few rows to be trained and measured on: 'b' (1 row)"),
        (list("abcdefg"), "'e' (1 row) and 2 more"),
    ],
)
def test_what_is_seldom_meant_is_named(labels: list[str], says: str) -> None:
    assert any(says in line for line in label_doubts(labels))


def test_usual_labels_raise_no_doubt() -> None:
    assert label_doubts([str(star) for star in range(1, 6)] * 3) == []
    assert label_doubts(["positive", "negative", "neutral"] * 3) == []


def test_a_column_with_a_label_for_each_row_is_no_column_of_classes() -> None:
    prices = [f"{number / 7:.2f}" for number in range(40)]
    with pytest.raises(DataError, match="column 'price' has 40 labels in 40 rows, and 40 of them have one row each"):
        refuse_lone_labels(prices, "a.csv", ["price"])
    refuse_lone_labels([f"class {number % 60}" for number in range(300)], "a.csv", ["label"])
    refuse_lone_labels(["a", "b", "b"], "a.csv", ["label"])


@pytest.mark.parametrize(
    ("numbers", "read"),
    [
        (["0,57", "3", "4,25"], ["0.57", "3", "4.25"]),
        (["0,125", "0,250"], ["0.125", "0.250"]),
        (["1,234", "2,500"], ["1,234", "2,500"]),  # thousands, or not: the run refuses them
        (["1,5", "2.5"], ["1,5", "2.5"]),
    ],
)
def test_decimal_commas_of_a_column_of_numbers(tmp_path, caplog, numbers, read):
    (tmp_path / "a.csv").write_text("text;score\n" + "".join(f"t{i};{n}\n" for i, n in enumerate(numbers)))
    with caplog.at_level(logging.WARNING):
        rows, _ = load_examples(str(tmp_path / "a.csv"), known=None)
    assert [row.label for row in rows] == read
    assert ("decimal points" in caplog.text) == (numbers != read)


def test_a_label_of_nested_lists_is_one_label(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "t", "label": "[[1, 2], [3]]"}\n')
    rows, _ = load_examples(str(tmp_path / "a.jsonl"))
    assert rows[0].label == "[[1, 2], [3]]"
