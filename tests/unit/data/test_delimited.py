import csv
import gzip
import io
import lzma
import zipfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deploykit.data.delimited import find_layout
from deploykit.data.read import read_records, reading_notes
from deploykit.data.reading import AS_FOUND, Reading
from deploykit.errors import DataError


def values(path: Path, reading: Reading = AS_FOUND) -> list[tuple[object, ...]]:
    return [tuple(record.values.values()) for record in read_records(str(path), reading)]


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8", newline="")
    return path


def test_quotes_that_open_cells_of_a_tsv_swallow_no_rows(tmp_path):
    lines = [f"text {i}\t{'pos' if i % 2 else 'neg'}" for i in range(450)]
    lines[10] = '"tis the season\tpos'
    lines[200] = "a 5'10\"\tneg"  # closes the quote, were it one: 190 rows would be one text
    path = write(tmp_path / "a.tsv", "text\tlabel\n" + "\n".join(lines) + "\n")
    assert len(values(path)) == 450
    assert values(path)[10] == ('"tis the season', "pos")
    assert reading_notes(str(path)) == ["fields separated by tabs, quotes are characters like others"]


def test_lone_quotes_in_a_csv_swallow_no_rows_where_the_labels_tell(tmp_path):
    lines = [f"text {i},{'pos' if i % 2 else 'neg'}" for i in range(60)]
    lines[10], lines[30] = '"tis the season,pos', "a 5'10\",neg"
    path = write(tmp_path / "a.csv", "text,label\n" + "\n".join(lines) + "\n")
    assert len(values(path)) == 60


def test_quoted_fields_of_several_lines_are_kept_and_told(tmp_path):
    path = write(tmp_path / "a.csv", 'text,label\nx,pos\n"hello, world\nbye",pos\ny,neg\n')
    assert values(path) == [("x", "pos"), ("hello, world\nbye", "pos"), ("y", "neg")]
    assert reading_notes(str(path)) == ["1 rows have a field of several lines (the first at line 3)"]


def test_backslash_escaped_quotes(tmp_path):
    path = write(tmp_path / "a.csv", 'text,label\n"He said \\"hi, you\\" twice",pos\n"a \\\\ b",neg\n')
    assert values(path) == [('He said "hi, you" twice', "pos"), ("a \\ b", "neg")]


def test_pipes_separate(tmp_path):
    assert values(write(tmp_path / "a.csv", "text|label\na, b|x\n")) == [("a, b", "x")]


def test_empty_cells_that_open_a_file_without_a_header_are_a_row(tmp_path):
    path = write(tmp_path / "a.tsv", "\n\t\na\tb\n")
    assert values(path, Reading(no_header=True)) == [("", ""), ("a", "b")]


def test_a_line_that_tells_excel_the_separator_is_no_header(tmp_path):
    assert values(write(tmp_path / "a.csv", "sep=;\ntext;label\na, b;x\n")) == [("a, b", "x")]
    assert values(write(tmp_path / "b.csv", "sep=;\r\n\r\na, b;x\r\n"), Reading(no_header=True)) == [("a, b", "x")]


def test_repeated_headers_are_dropped_and_counted(tmp_path):
    path = write(tmp_path / "a.csv", "text,label\na,x\ntext,label\nb,y\n\ufefftext,label\nc,x\n")
    assert values(path) == [("a", "x"), ("b", "y"), ("c", "x")]
    assert reading_notes(str(path)) == ["2 repeated header lines dropped"]


def test_byte_order_marks_of_concatenated_files_are_no_text(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('\ufeff\ufefftext,label\na,x\n\ufefftext,label\nb,y\n\ufeff"c, d",x\n', encoding="utf-8")
    assert values(path) == [("a", "x"), ("b", "y"), ("c, d", "x")]
    assert find_layout(path).repeated_headers == 1


def test_columns_without_a_name_at_the_end_are_left_out_and_told(tmp_path):
    path = write(tmp_path / "spam.csv", "v1,v2,,,\nham,hello,,,\nspam,win,now,,\n")
    assert [dict(r.values) for r in read_records(str(path))] == [
        {"v1": "ham", "v2": "hello"},
        {"v1": "spam", "v2": "win"},
    ]
    assert reading_notes(str(path)) == [
        "3 columns without a name at the end; 1 rows have a cell there, which is not read"
    ]


CELLS = st.text(st.characters(codec="utf-8", exclude_characters="\0\ufeff"), max_size=20)


@settings(max_examples=300, deadline=None)
@given(rows=st.lists(st.tuples(CELLS, CELLS), max_size=12), delimiter=st.sampled_from([",", ";", "\t", "|"]))
def test_what_the_csv_module_writes_is_read_unchanged(tmp_path_factory, rows, delimiter):
    # Quoted throughout: a cell that opens with a quote then has a header that does too.
    written = io.StringIO()
    csv.writer(written, delimiter=delimiter, quoting=csv.QUOTE_ALL).writerows([("text", "label"), *rows])
    path = write(tmp_path_factory.mktemp("h") / "a.csv", written.getvalue())
    assert values(path) == [row for row in rows if row != ("text", "label")]


PLAIN = st.text(st.characters(codec="utf-8", exclude_characters="\0\ufeff\t\r\n"), min_size=1, max_size=20)


@settings(max_examples=300, deadline=None)
@given(texts=st.lists(PLAIN, min_size=4, max_size=30))
def test_a_tsv_without_quoting_keeps_each_line_a_row(tmp_path_factory, texts):
    texts.insert(2, '"odd')
    rows = [(text, "pos" if i % 2 else "neg") for i, text in enumerate(texts)]
    path = write(tmp_path_factory.mktemp("h") / "a.tsv", "text\tlabel\n" + "".join(f"{t}\t{y}\n" for t, y in rows))
    found = values(path)
    assert len(found) == len(rows)
    if find_layout(path).quoting == "none":
        assert found == rows


@pytest.mark.parametrize("suffix", ["gz", "xz", "zip", "zst"])
def test_compressed_files_are_read(tmp_path, suffix):
    content = b"text\tlabel\n" + "grün\tx\n".encode() * 5000
    path = tmp_path / f"a.tsv.{suffix}"
    if suffix == "gz":
        path.write_bytes(gzip.compress(content))
    elif suffix == "xz":
        path.write_bytes(lzma.compress(content))
    elif suffix == "zst":
        path.write_bytes(pytest.importorskip("zstandard").ZstdCompressor().compress(content))
    else:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("inner.tsv", content)
            archive.writestr("__MACOSX/._inner.tsv", b"x")
    assert values(path) == [("grün", "x")] * 5000


def test_a_zip_has_the_format_of_the_file_in_it_and_holds_one(tmp_path):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("b.jsonl", '{"text": "a"}\n')
    assert values(path) == [("a",)]
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("c.csv", "text\n")
    with pytest.raises(DataError, match="holds 2 files"):
        values(path)


def test_a_damaged_archive_is_named(tmp_path):
    path = tmp_path / "a.csv.gz"
    path.write_bytes(gzip.compress(b"text,label\n" + b"x,y\n" * 10_000)[:60])
    with pytest.raises(DataError, match=r"a.csv.gz: the compressed file is damaged"):
        values(path)
    path.write_bytes(b"text\nx\n")
    with pytest.raises(DataError, match="damaged"):
        values(path)


def test_json_lines_named_json(tmp_path):
    assert values(write(tmp_path / "a.json", '{"text": "a"}\n{"text": "b"}\n')) == [("a",), ("b",)]


def test_a_workbook(tmp_path):
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    for row in [("text", "label", None), ("grün", 1, None), (None, None, None), ("b", 2, None)]:
        book.active.append(row)
    book.save(tmp_path / "a.xlsx")
    assert values(tmp_path / "a.xlsx") == [("grün", 1), ("b", 2)]


@pytest.mark.parametrize("cells", [("Answers of May", None, None), (None, "Answers of May", None)])
def test_a_title_above_the_header_of_a_workbook_is_refused(tmp_path, cells):
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    for row in [cells, (None, None, None), ("text", "label", "date"), ("a", "x", None)]:
        book.active.append(row)
    book.active.merge_cells("A1:A2")
    book.save(tmp_path / "a.xlsx")
    with pytest.raises(DataError, match=r"a.xlsx: row 1 has one cell, 'Answers of May', and row 3 has more"):
        values(tmp_path / "a.xlsx")


def test_a_workbook_with_one_named_column_is_read(tmp_path):
    """The first column is pandas' index."""
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    for row in [(None, "text"), (0, "a"), (1, "b")]:
        book.active.append(row)
    book.save(tmp_path / "a.xlsx")
    assert [record.values["text"] for record in read_records(str(tmp_path / "a.xlsx"))] == ["a", "b"]


def test_class_labels_of_parquet_keep_their_names(tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])})
    datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, -1]}, features).to_parquet(tmp_path / "a.parquet")
    assert values(tmp_path / "a.parquet") == [("a", "pos"), ("b", None)]


def test_a_number_without_a_class_label_is_refused_or_skipped(tmp_path):
    datasets = pytest.importorskip("datasets")
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])})
    table = pyarrow.table({"text": ["a", "b"], "label": [1, 2]}, schema=features.arrow_schema)
    parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a.parquet:2: column 'label' has 2, and its ClassLabel has 2 names: neg, pos"):
        values(tmp_path / "a.parquet")
    first, second = read_records(str(tmp_path / "a.parquet"), Reading(on_error="skip"))
    assert (first.values["label"], second.values) == ("pos", {})
    assert second.problem.startswith("column 'label' has 2")


def test_a_cloned_dataset_has_its_splits(tmp_path):
    (tmp_path / "data").mkdir()
    write(tmp_path / "data" / "train-00000-of-00002.csv", "text,label\na,x\n")
    write(tmp_path / "data" / "train-00001-of-00002.csv", "text,label\nb,y\n")
    write(tmp_path / "data" / "dev.jsonl", '{"text": "c", "label": "x"}\n')
    write(tmp_path / "README.md", "# no card\n")
    assert values(tmp_path) == [("a", "x"), ("b", "y")]
    assert [r.values["text"] for r in read_records(str(tmp_path), split="validation")] == ["c"]
    with pytest.raises(DataError, match=r"no files of the split 'test'; it has train, validation"):
        list(read_records(str(tmp_path), split="test"))


def test_the_card_of_a_dataset_names_its_files_and_none_outside(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    write(tmp_path / "secret.csv", "text,label\nsecret,x\n")
    write(folder / "rows.csv", "text,label\na,x\n")
    card = "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: {}\n---\n"
    write(folder / "README.md", card.format("rows*.csv"))
    assert values(folder) == [("a", "x")]
    write(folder / "README.md", card.format("../*.csv"))
    with pytest.raises(DataError, match="no file matches"):
        values(folder)
    (tmp_path / "link.csv").symlink_to(tmp_path / "secret.csv")
    write(folder / "README.md", card.format("../link.csv"))
    with pytest.raises(DataError, match="no file matches"):
        values(folder)
    (folder / "blob.csv").symlink_to(tmp_path / "secret.csv")  # as the hub's cache keeps its files
    write(folder / "README.md", card.format("blob.csv"))
    assert values(folder) == [("secret", "x")]


def test_a_folder_of_texts_for_each_label(tmp_path):
    for label in ("neg", "pos"):
        (tmp_path / "train" / label).mkdir(parents=True)
        write(tmp_path / "train" / label / "1.txt", f"{label}\ntext")
    assert values(tmp_path) == [("neg\ntext", "neg"), ("pos\ntext", "pos")]
    assert [r.origin for r in read_records(str(tmp_path))] == ["train/neg/1.txt", "train/pos/1.txt"]


def test_a_zst_file_that_is_damaged_or_cut_is_refused_and_frames_are_joined(tmp_path):
    compress = pytest.importorskip("zstandard").ZstdCompressor().compress
    rows = b"".join(b"%d\tx\n" % number for number in range(50_000))
    whole = compress(b"text\tlabel\n" + rows) + compress(b"last\tx\n")
    path = tmp_path / "a.tsv.zst"
    path.write_bytes(whole)
    assert len(values(path)) == 50_001
    for content in (whole[:5000], b"text\tlabel\na\tx\n"):
        path.write_bytes(content)
        with pytest.raises(DataError, match="is damaged"):
            values(path)
