from hypothesis import given
from hypothesis import strategies as st

from deploykit.data.grouping import duplicate_key
from deploykit.tasks.classification.clean import CleaningReport, clean
from deploykit.tasks.classification.rows import Example, RawExample

texts = st.none() | st.sampled_from(["a", "A ", "b", " ", "\0", "é", "e\u0301", "\ud800", "今天"]) | st.text(max_size=5)
raw_rows = st.lists(st.builds(RawExample, texts, st.sampled_from([None, "", "x", "y"]), st.just("o:1")), max_size=40)


def raw(*rows):
    return [RawExample(text, label, f"f:{i}") for i, (text, label) in enumerate(rows, start=1)]


def test_every_step_is_counted():
    kept, report = clean(
        raw(
            (None, "x"),
            ("t", None),
            ("t", ""),
            (" \0 ", "x"),
            ("Hello  World", "x"),
            ("hello world ", "x"),
            ("same", "x"),
            ("SAME", "y"),
            ("same", "x"),
            ("e\u0301\ud800", "y"),
        ),
        multi_label=False,
    )
    assert kept == [Example("Hello  World", "x", "f:5"), Example("é\ufffd", "y", "f:10")]
    assert report == CleaningReport(
        rows_read=10,
        missing_text=1,
        missing_label=2,
        empty_text=1,
        unicode_repaired=1,
        exact_duplicates=1,
        conflicting_duplicates=3,
        rows_kept=2,
    )
    assert report.lines()[0] == "10 rows read"
    assert "  -        3 duplicates with conflicting labels dropped" in report.lines()
    assert report.lines()[-1] == "2 rows kept"


def test_outer_white_space_is_no_repair():
    assert clean(raw((" a ", "x"), ("b\n", "x")), multi_label=False)[1].unicode_repaired == 0


def test_row_without_labels_is_kept_for_multi_label():
    kept, report = clean(raw(("a", ""), ("b", None)), multi_label=True)
    assert [e.label for e in kept] == [""]
    assert report.missing_label == 1


@given(raw_rows, st.booleans())
def test_rows_add_up_and_what_is_kept_is_unique(rows, multi_label):
    kept, report = clean(rows, multi_label=multi_label)
    counts = report.to_json()
    assert counts.pop("rows_read") == len(rows)
    del counts["unicode_repaired"]
    assert sum(counts.values()) == len(rows)
    assert report.rows_kept == len(kept)
    keys = [duplicate_key(e.text) for e in kept]
    assert len(set(keys)) == len(keys)
    again, second = clean([RawExample(e.text, e.label, e.origin) for e in kept], multi_label=multi_label)
    assert again == kept
    assert second.unicode_repaired == 0
