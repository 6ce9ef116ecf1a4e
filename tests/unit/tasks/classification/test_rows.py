import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from deploykit.errors import DataError, UsageError
from deploykit.stages.finetune_options import make_options
from deploykit.tasks.classification.clean import clean
from deploykit.tasks.classification.evaluate import labelled_rows
from deploykit.tasks.classification.facts import Classification
from deploykit.tasks.classification.options import ClassificationOptions
from deploykit.tasks.classification.rows import Columns, Example, check_labels, load_examples
from deploykit.tasks.classification.training import kept_order, trained_labels
from deploykit.tasks.registry import task_to_json


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


def test_labels_are_spelled_as_the_model_does_and_that_is_said(tmp_path, caplog):
    assert labels_of(tmp_path, ["0", "TRUE", "x"], known=("0.0", "True")) == ["0.0", "True", "x"]
    assert "labels with the same meaning were merged: '0' is '0.0', 'TRUE' is 'True'" in caplog.text
    assert labels_of(tmp_path, ["1.0", "1"], known=None) == ["1.0", "1"]


@pytest.mark.parametrize("cell", ["['a' 'b']", "[a, b]", "[0 0 1]"])
def test_text_that_only_looks_like_a_list_is_refused(tmp_path, cell):
    with pytest.raises(DataError, match=r'a.jsonl:1: .* is neither a Python nor a JSON list\n.*\["one", "other"\]'):
        labels_of(tmp_path, [cell], multi_label=True)
    assert labels_of(tmp_path, [cell, "[OC]|x"], multi_label=True, label_separator="|") == [cell, "[OC]|x"]


def test_two_numbers_for_two_named_labels_tell_which_a_row_has(tmp_path):
    cells = [[0.0, 1.0], [1, 0], []]
    assert labels_of(tmp_path, cells[:2], multi_label=True, labels=("x", "y")) == ["y", "x"]
    assert labels_of(tmp_path, cells, multi_label=True) == ["0|1", "0|1", ""]  # may be names
    with pytest.raises(DataError, match="nothing names the labels"):
        labels_of(tmp_path, [[False, True]], multi_label=True)


@pytest.mark.parametrize(
    ("cells", "message"), [([[0, 0, 1], [1, 1]], "that have 2, 3 numbers"), ([[0.3, 0.7]], "numbers such as 0.3")]
)
def test_lists_of_numbers_that_tell_no_labels_are_refused(tmp_path, cells, message):
    with pytest.raises(DataError, match=message):
        labels_of(tmp_path, cells, multi_label=True)


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


ONE_HOT = "text,sport,news,rare\na,1,0,0\nb,True,1.0,0\nc,0,0,0\nd,1,,0\n"


def test_columns_of_0_and_1_are_labels_where_several_are_named(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text(ONE_HOT)
    examples, columns = load_examples(str(path), label_columns=("sport", "news", "rare"), multi_label=True)
    assert columns == Columns(("text",), ("sport", "news", "rare"))
    assert [(e.text, e.label) for e in examples] == [("a", "sport"), ("b", "news|sport"), ("c", ""), ("d", None)]
    named = ClassificationOptions(model="m", train="a.csv", multi_label=True, label_column=("sport", "news", "rare"))
    named.check()
    assert named.named_labels == ("sport", "news", "rare")  # a label that no row has, too


def test_columns_of_other_values_are_refused_with_the_row(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("text,sport,news\na,1,0\nb,1,maybe\n")
    with pytest.raises(DataError, match=r"a.csv:3: column 'news' has 'maybe'"):
        load_examples(str(path), label_columns=("sport", "news"), multi_label=True)
    with pytest.raises(UsageError, match="several --label-column are for several labels"):
        load_examples(str(path), label_columns=("sport", "news"))
    with pytest.raises(UsageError, match="--multi-label"):
        ClassificationOptions(model="m", train="a.csv", label_column=("sport", "news")).check()


def test_a_model_of_several_label_columns_is_measured_by_them(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text(ONE_HOT)
    task = Classification(("news", "rare", "sport"), 8, 0, multi_label=True, label_column=("sport", "news", "rare"))
    rows = labelled_rows(str(path), task)
    assert [e.label for e in rows.examples] == ["sport", "news|sport", ""]
    assert rows.problems == ("a.csv:5: the label is missing",)


def test_rows_of_one_label_each_are_measured_as_texts_with_all_their_labels(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("text,label\ngoal,sport\nvote,news\nGoal ,news\n")
    rows = labelled_rows(str(path), Classification(("news", "sport"), 8, 0, multi_label=True))
    assert [(e.text, e.label) for e in rows.examples] == [("goal", "news|sport"), ("vote", "news")]
    assert rows.notes == ("3 rows with a label each are 2 texts with all their labels",)


def test_a_manifest_holds_one_label_column_as_it_did_before_there_were_several():
    facts = Classification(("a", "b"), 8, 0, label_column="stars")
    assert task_to_json(facts)["label_column"] == "stars"
    assert facts.label_columns == ("stars",)


def test_an_option_for_one_value_may_not_be_repeated():
    assert make_options({"model": "m", "train": "a", "label_column": "x"}).label_column == ("x",)
    with pytest.raises(UsageError, match="--source-column is given 2 times"):
        make_options({"task": "translation", "model": "m", "train": "a", "source_column": ("a", "b")})


def test_training_for_int8_needs_held_out_rows():
    options = ClassificationOptions(model="m", train="a", qat=True, validation_fraction=0, test_fraction=0)
    with pytest.raises(UsageError, match="--qat measures before and after training, but no rows are held out"):
        options.check()


@pytest.mark.parametrize("cell", [["x"], {"x": 1}])
def test_a_list_or_an_object_is_no_text(tmp_path, cell):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"a": "one", "b": cell, "label": "x"}))
    (row,), _ = load_examples(str(path), text_columns=("a", "b"))
    assert row.text is None
    with pytest.raises(DataError, match=r"a\.jsonl:1: a text of the pair is a list or an object"):
        load_examples(str(path), text_columns=("a", "b"), pair=True)
