import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from deploykit.errors import DataError
from deploykit.tasks.classification.clean import clean
from deploykit.tasks.classification.rows import Example, check_labels, load_examples
from deploykit.tasks.classification.training import kept_order, trained_labels


def labels_of(folder: Path, cells: list[object], **options: object) -> list[str | None]:
    path = folder / "a.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"t{i}", "label": cell}) for i, cell in enumerate(cells)))
    return [example.label for example in load_examples(str(path), **options)[0]]


def test_lists_of_0_and_1_are_one_for_each_label(tmp_path):
    cells = [[0, 0, 1], [1, 0, 1], [0, 0, 0]]
    with pytest.raises(DataError, match=r"lists of 3 numbers 0 and 1.*\n.*--labels NAME1,NAME2,NAME3"):
        labels_of(tmp_path, cells, multi_label=True)
    assert labels_of(tmp_path, cells, multi_label=True, labels=("x", "y", "z")) == ["z", "x|z", ""]
    with pytest.raises(DataError, match="there are 2 labels: x, y"):
        labels_of(tmp_path, cells, multi_label=True, labels=("x", "y"))


def test_lists_of_names_that_look_like_numbers_stay_names(tmp_path):
    assert labels_of(tmp_path, [[0], [1], [0]], multi_label=True) == ["0", "1", "0"]
    assert labels_of(tmp_path, [[0, 3], [1], []], multi_label=True) == ["0|3", "1", ""]


@pytest.mark.parametrize("cell", ["['a', 'b']", '["b", "a"]', "a|b", " b | a "])
def test_every_way_to_write_several_labels(tmp_path, cell):
    assert labels_of(tmp_path, [cell, "a"], multi_label=True) == ["a|b", "a"]


def test_commas_between_labels_are_asked_about(tmp_path):
    cells = ["a,b", "b", "c, a"]
    with pytest.raises(DataError, match=r"some have ',': 'a,b'\n.*--label-separator"):
        labels_of(tmp_path, cells, multi_label=True)
    assert labels_of(tmp_path, cells, multi_label=True, label_separator=",") == ["a|b", "b", "a|c"]
    assert labels_of(tmp_path, cells, multi_label=True, label_separator="|") == ["a,b", "b", "c, a"]


def test_spellings_of_one_label_are_one(tmp_path):
    assert labels_of(tmp_path, [0, "0.0", 1.0, "1", True, "True"]) == ["0", "0", "1", "1", "true", "true"]
    assert labels_of(tmp_path, ["1.5", "Yes", "yes", "00"]) == ["1.5", "Yes", "yes", "00"]


def test_rows_of_one_label_each_are_the_labels_of_their_text(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("text,label\nhello,a\nother,b\nhello,c\nhello,a\n")
    kept, report = clean(load_examples(str(path), multi_label=True)[0], multi_label=True)
    assert [(e.text, e.label) for e in kept] == [("hello", "a|c"), ("other", "b")]
    assert (report.joined_labels, report.exact_duplicates, report.conflicting_duplicates) == (1, 1, 0)


def test_labels_that_training_lacks_are_named_with_their_counts():
    rows = [Example("t", label, f"f:{i}") for i, label in enumerate(["a", "x", "y", "x"])]
    with pytest.raises(DataError, match=r"'x' \(2 rows\), 'y' \(1 row\); the first is at f:1"):
        check_labels(rows, ["a"], "f")


def test_the_order_of_a_trained_head_is_kept_for_equal_labels():
    assert kept_order(("neg", "neu", "pos"), ("pos", "neg", "neu")) == ("pos", "neg", "neu")
    assert kept_order(("0", "1"), ("LABEL_0", "LABEL_1")) == ("0", "1")
    assert kept_order(("a", "b"), ("LABEL_0", "LABEL_1")) is None
    assert kept_order(("a", "b"), ("b", "a", "c")) is None
    assert kept_order(("a", "b"), ()) is None


def test_only_a_checkpoint_with_a_head_has_trained_labels():
    config = SimpleNamespace(architectures=["BertForMaskedLM"], id2label={0: "LABEL_0"}, num_labels=1)
    assert trained_labels(config) == ()
    config.architectures = ["BertForSequenceClassification"]
    assert trained_labels(config) == ("LABEL_0",)
