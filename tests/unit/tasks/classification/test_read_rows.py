import json

import pytest

from deploykit.data.texts import TextRow, read_texts
from deploykit.errors import DataError, UsageError
from deploykit.tasks.classification.rows import (
    Columns,
    Example,
    check_labels,
    detect_columns,
    load_examples,
    sort_labels,
    validate,
)


def jsonl(path, *rows):
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["sentiment", "confidence", "text"], Columns(("text",), ("sentiment",))),
        (["Tweet", "CLASS"], Columns(("Tweet",), ("CLASS",))),
        (["title", "body", "stars", "labels"], Columns(("body",), ("labels",))),
        (["utterance", "intent"], Columns(("utterance",), ("intent",))),
        (["y", "text"], Columns(("text",), ("y",))),
    ],
)
def test_usual_columns_are_detected(names, expected):
    assert detect_columns(names, source="a.csv") == expected


def test_given_columns_win_over_usual_ones():
    names = ["text", "label", "a", "b"]
    assert detect_columns(names, text=["a", "b"], labels=["text"], source="s") == Columns(("a", "b"), ("text",))
    assert detect_columns(["text", "other"], labels=["text"], source="s") == Columns(("other",), ("text",))


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        (["a", "b"], {}, "as the text; its columns are 'a', 'b'\n.*--text-column"),
        (["text", "b", "c"], {}, "as the label; its columns are 'text', 'b', 'c'\n.*--label-column"),
        (["text"], {}, "as the label"),
        (["a", "label", "c"], {}, "as the text"),
        (["text", "label"], {"text": ["Text"]}, "no column 'Text'; its columns are 'text', 'label'"),
        (["text", "label"], {"labels": ["y"]}, "no column 'y'"),
    ],
)
def test_columns_not_found_are_an_error_with_the_list(names, options, message):
    with pytest.raises(DataError, match=f"(?s)a.csv: .*{message}"):
        detect_columns(names, source="a.csv", **options)


def test_one_column_cannot_be_text_and_label():
    with pytest.raises(UsageError):
        detect_columns(["text", "label"], text=["text"], labels=["text"], source="s")


@pytest.mark.parametrize(
    ("value", "label"),
    [("x", "x"), (" x ", "x"), (3, "3"), (1.0, "1"), (1.5, "1.5"), (True, "true"), ("\ud800", "\ufffd")]
    + [(value, None) for value in (None, float("nan"), "", " ", {"a": 1})],
)
def test_label_cells(tmp_path, value, label):
    examples, _ = load_examples(jsonl(tmp_path / "a.jsonl", {"text": "t", "label": value}))
    assert [e.label for e in examples] == [label]


@pytest.mark.parametrize(("value", "text"), [(5, "5"), (None, None), (float("nan"), None), (["a"], None), ("", "")])
def test_text_cells(tmp_path, value, text):
    examples, _ = load_examples(jsonl(tmp_path / "a.jsonl", {"text": value, "label": "x"}))
    assert [e.text for e in examples] == [text]


def test_preferred_columns_are_used_where_the_source_has_them(tmp_path):
    source = jsonl(tmp_path / "a.jsonl", {"text": "t", "label": "l", "a": "x", "y": "z"})
    assert load_examples(source, prefer=Columns(("a",), ("y",)))[1] == Columns(("a",), ("y",))
    assert load_examples(source, prefer=Columns(("a", "none"), ("none",)))[1] == Columns(("text",), ("label",))
    assert load_examples(source, label_columns=["a"], prefer=Columns(("a",), ("y",)))[1] == Columns(("text",), ("a",))


def test_columns_may_first_appear_in_a_later_json_row(tmp_path):
    source = jsonl(tmp_path / "a.jsonl", {"text": "a"}, {"text": "b", "label": "x"})
    examples, columns = load_examples(source)
    assert columns == Columns(("text",), ("label",))
    assert [(e.origin, e.label) for e in examples] == [("a.jsonl:1", None), ("a.jsonl:2", "x")]


def test_text_columns_are_joined_without_the_missing_ones(tmp_path):
    rows = [{"a": "x", "b": "y"}, {"a": None, "b": "y"}, {"a": "x", "b": " "}, {"a": None, "b": None}]
    source = jsonl(tmp_path / "a.jsonl", *({**row, "label": 1} for row in rows))
    examples, columns = load_examples(source, text_columns=["a", "b"], separator=" / ")
    assert [e.text for e in examples] == ["x / y", "y", "x", None]
    assert columns == Columns(("a", "b"), ("label",))


@pytest.mark.parametrize(
    ("value", "label"),
    [("b|a|b", "a|b"), (["b", "a"], "a|b"), ([], ""), ("", ""), (" a | ", "a"), ("a,b", "a,b"), (2, "2"), (None, None)],
)
def test_multi_label_cells_become_sorted_unique_names(tmp_path, value, label):
    source = jsonl(tmp_path / "a.jsonl", {"text": "t", "labels": value})
    assert load_examples(source, multi_label=True)[0][0].label == label


def test_list_without_multi_label_and_separator_in_a_name_are_errors(tmp_path):
    with pytest.raises(DataError, match=r"a.jsonl:1: column 'label' holds a list.*\n.*--multi-label"):
        load_examples(jsonl(tmp_path / "a.jsonl", {"text": "t", "label": ["a"]}))
    for cell in ("['a', 'b']", '["a"]', "[0, 1, 0]"):
        with pytest.raises(DataError, match=r"c.jsonl:1: column 'label' holds a list.*\n.*--multi-label"):
            load_examples(jsonl(tmp_path / "c.jsonl", {"text": "t", "label": cell}))
    for cell in ("[18, 25]", "[LOC]", "[]", "['a' 'b']"):
        assert load_examples(jsonl(tmp_path / "c.jsonl", {"text": "t", "label": cell}))[0][0].label == cell
    with pytest.raises(DataError, match=r"b.jsonl:1: column 'label' has the label 'a\|b'"):
        load_examples(jsonl(tmp_path / "b.jsonl", {"text": "t", "label": ["a|b"]}), multi_label=True)


def test_integer_labels_with_gaps_in_parquet_stay_integers(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"text": ["a", "b", "c"], "label": [1.0, None, float("nan")]})
    parquet.write_table(table, tmp_path / "a.parquet")
    assert [e.label for e in load_examples(str(tmp_path / "a.parquet"))[0]] == ["1", None, None]


def test_source_without_rows_is_an_error(tmp_path):
    (tmp_path / "a.csv").write_text("text,label\n")
    with pytest.raises(DataError, match=r"a\.csv: has no rows"):
        load_examples(str(tmp_path / "a.csv"))


def test_texts_are_read_without_labels_and_every_row_is_answered_for(tmp_path):
    source = jsonl(tmp_path / "a.jsonl", {"message": " a\u0000b "}, {"message": None}, {"message": "\u0000"})
    assert list(read_texts(source)) == [
        TextRow("a.jsonl:1", "a b", None),
        TextRow("a.jsonl:2", None, "the text is missing"),
        TextRow("a.jsonl:3", "", None),
    ]
    assert next(read_texts(jsonl(tmp_path / "b.jsonl", {"only": "x"}))).text == "x"
    with pytest.raises(DataError, match="no column 'y'"):
        list(read_texts(source, ["y"]))


def test_text_file_has_one_text_a_line(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("one, two\r\n\nثلاثة".encode())
    assert [(r.origin, r.text) for r in read_texts(str(path))] == [
        ("a.txt:1", "one, two"),
        ("a.txt:2", ""),
        ("a.txt:3", "ثلاثة"),
    ]
    path.write_bytes(b"ok\n\xe9\n")
    with pytest.raises(DataError, match="line 2, byte offset 3"):
        list(read_texts(str(path)))
    with pytest.raises(DataError, match="cannot be read: No such file"):
        list(read_texts(str(tmp_path / "none.txt")))


def test_labels_sort_by_number_only_if_all_are_integers():
    assert sort_labels(["10", "9", "-1", "9"]) == ("-1", "9", "10")
    assert sort_labels(["10", "9", "a"]) == ("10", "9", "a")


def test_unseen_labels_are_all_named_with_the_first_row():
    examples = [Example("t", label, f"v.csv:{i}") for i, label in enumerate(["a", "z", "y", "z"])]
    with pytest.raises(DataError, match=r"v\.csv: labels .* 'y' \(1 row\), 'z' \(2 rows\); the first is at v\.csv:1"):
        check_labels(examples, ["a"], "v.csv")
    check_labels([Example("t", "a|b", "x:1"), Example("t", "", "x:2")], ["a", "b"], "x")
    with pytest.raises(DataError, match=r"'a\|b'"):
        check_labels([Example("t", "a|b", "x:1")], ["a", "b"], "x", multi_label=False)


def test_rows_that_cannot_teach_a_classifier_are_refused():
    with pytest.raises(DataError, match="no usable rows"):
        validate([], "a.csv")
    with pytest.raises(DataError, match="every row has the label 'a'"):
        validate([Example("x", "a", "o"), Example("y", "a", "o")], "a.csv")
    with pytest.raises(DataError, match="no row has a label"):
        validate([Example("x", "", "o")], "a.csv", multi_label=True)
    validate([Example("x", "a", "o"), Example("y", "b", "o")], "a.csv")


def test_an_object_or_a_list_is_named_where_a_text_is_wanted(tmp_path):
    source = jsonl(tmp_path / "a.jsonl", {"text": {"en": "t"}, "label": "a"}, {"text": ["t"], "label": "a"})
    told = ["'text' holds an object, not a text", "'text' holds a list, not a text"]
    assert [(row.text, row.problem) for row in read_texts(source)] == [(None, problem) for problem in told]
    assert [(row.text, row.problem) for row in load_examples(source)[0]] == [(None, problem) for problem in told]
