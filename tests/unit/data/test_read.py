import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from deploykit.data.open_text import read_text
from deploykit.data.read import read_records
from deploykit.data.reading import Reading
from deploykit.errors import DataError, MissingDependencyError, UsageError


def rows(source: Path, **options: object) -> list[tuple[str, dict]]:
    return [(r.origin, dict(r.values)) for r in read_records(str(source), **options)]


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content)
    return path


@pytest.fixture
def saved_dataset(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    names = datasets.ClassLabel(names=["neg", "pos"])
    features = datasets.Features({"text": datasets.Value("string"), "label": names, "tags": datasets.List(names)})
    dataset = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, -1], "tags": [[0, 1], []]}, features)
    datasets.DatasetDict(train=dataset, held=dataset.select([0])).save_to_disk(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", "text,label\nhello,x\n"),
        ("a.csv", "text;label\r\nhello;x\r\n"),
        ("a.csv", "text\tlabel\nhello\tx"),
        ("a.tsv", "text\tlabel\nhello\tx\n"),
        ("a.CSV", "\ufefftext, label\nhello,x\n"),
        ("a.csv", "text,label\nhello,x\n".encode("utf-16")),
        ("a.csv", "text,label\nhello,x\n".encode("utf-32")),
    ],
)
def test_csv_dialects_and_byte_order_marks_are_recognized(tmp_path, name, content):
    assert rows(write(tmp_path / name, content)) == [(f"{name}:2", {"text": "hello", "label": "x"})]


def test_csv_origin_is_the_line_on_which_a_row_starts(tmp_path):
    path = write(tmp_path / "a.csv", '\n\ntext,label\n"two\nlines",x\n\nshort\n')
    assert rows(path) == [
        ("a.csv:4", {"text": "two\nlines", "label": "x"}),
        ("a.csv:7", {"text": "short", "label": None}),
    ]


@pytest.mark.parametrize("text", ["x" * 200_000, "🎉👩‍👩‍👧", "今天天气很好", "مرحبا بالعالم", "a\u2028b"])
@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_any_text_is_read_unchanged(tmp_path, text, suffix):
    content = f"text,label\n{text},x\n" if suffix == "csv" else json.dumps({"text": text, "label": "x"})
    assert rows(write(tmp_path / f"a.{suffix}", content))[0][1] == {"text": text, "label": "x"}


@pytest.mark.skipif(sys.version_info < (3, 11), reason="csv refuses NUL before Python 3.11")
def test_csv_keeps_nul_characters(tmp_path):
    assert rows(write(tmp_path / "a.csv", "text\na\0b\n"))[0][1] == {"text": "a\0b"}


def test_jsonl_skips_blank_lines_and_keeps_lone_surrogates(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"text": "\\ud800"}\n\n{"text": NaN}\r\n')
    (first, one), (second, two) = rows(path)
    assert (first, one, second) == ("a.jsonl:1", {"text": "\ud800"}, "a.jsonl:3")
    assert two["text"] != two["text"]


def test_json_array(tmp_path):
    assert rows(write(tmp_path / "a.json", '[{"text": "a"}, {"text": 1}]')) == [
        ("a.json:1", {"text": "a"}),
        ("a.json:2", {"text": 1}),
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "", "is empty"),
        ("a.csv", "\ufeff \n\n", "is empty"),
        ("a.csv", "a,b,a\n", "two columns are named 'a'"),
        ("a.csv", "a,,b\n", "column 2 has no name"),
        ("a.csv", "a,b\n1,2\n1,2,3\n", "row at line 3 has 3 fields, the header has 2"),
        ("a.csv", 'a,b\n1,2\n1,"x\ny\n', "row at line 3 is malformed"),
        ("a.csv", 'a,b\n"x" y,2\n', "row at line 2 is malformed"),
        ("a.csv", b"\x89PNG\r\n\x1a\n" + bytes(range(256)), "is not text: it seems to be a PNG image"),
        ("a.csv", b"PK\x03\x04" + b"\0" * 50, "Excel workbook"),
        ("a.csv", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a Git LFS pointer"),
        ("a.parquet", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        ("a.jsonl", b"PAR1" + b"\0" * 50, "a Parquet file"),
        ("a.csv", bytes(range(256)) * 8, "is not text"),
        ("a.csv", "text,label\nhello,x\n".encode("utf-16-le"), "give --encoding utf-16-le"),
        ("a.csv", "text\na\n".encode("utf-16-le"), "give --encoding utf-16-le"),
        ("a.csv", "text\na\n".encode("utf-16-be"), "give --encoding utf-16-be"),
        ("a.csv", b"text,label\nok,x\ncaf\xe9,y\n", "line 3, byte offset 19, is not utf-8"),
        ("a.csv", b"\xef\xbb\xbftext\n\xe9\n", "line 2, byte offset 8, is not utf-8"),
        ("a.csv", b"text\n" + b"good\n" * 30_000 + b"\xe9\n", "line 30002, byte offset 150005, is not utf-8"),
        ("a.csv", b"text\nx\xc3", "line 2, byte offset 6, is not utf-8"),
        ("a.csv", "text\nhello".encode("utf-16") + b"x", "is not utf-16"),
        ("a.jsonl", '{"a": 1}\n{"a": \n', "line 2 is not JSON"),
        ("a.jsonl", "[" * 100_000, "line 1 is not JSON"),
        ("a.jsonl", '{"a": 1}\n[1]\n', "line 2 is not a JSON object"),
        ("a.json", '{"a": 1}', "is not a JSON array"),
        ("a.json", '{"a": 1} {"a": 1}', "the file is not JSON"),
        ("a.json", '[{"a": 1}, 2]', "row 2 is not a JSON object"),
        ("a.parquet", b"", "cannot be read after row 0"),
        ("a.parquet", "text,label\n", "cannot be read after row 0"),
        ("a.xlsx", b"PK\x03\x04", "is not a readable workbook"),
        ("a.ods", b"PK\x03\x04", "file type '.ods' is not supported"),
        ("a", b"text", "file type '' is not supported"),
    ],
)
def test_bad_file_is_refused_by_name_and_place(tmp_path, name, content, message):
    with pytest.raises(DataError) as caught:
        rows(write(tmp_path / name, content))
    assert message in str(caught.value)
    assert str(tmp_path / name) in caught.value.message
    assert caught.value.remedy


def test_header_only_csv_has_no_records(tmp_path):
    assert rows(write(tmp_path / "a.csv", "text,label\n")) == []


@pytest.mark.parametrize("source", ["missing.csv", "no/such/dir/file", "./nothing", "", "a\0b"])
def test_missing_path_is_no_such_file(source):
    with pytest.raises(DataError, match="no such file"):
        list(read_records(source))


def test_wrong_encoding_is_cured_by_the_option(tmp_path):
    path = write(tmp_path / "a.csv", "text\ncafé\n".encode("latin-1"))
    with pytest.raises(DataError, match="--encoding latin-1"):
        rows(path)
    assert rows(path, reading=Reading("latin-1"))[0][1] == {"text": "café"}


@pytest.mark.parametrize("encoding", ["no-such", "rot13", "base64", "a\0b"])
def test_unknown_encoding_is_a_usage_error(tmp_path, encoding):
    with pytest.raises(UsageError, match="is not a known text encoding"):
        rows(write(tmp_path / "a.csv", "text\nx\n"), reading=Reading(encoding))


def test_file_is_read_whole_for_any_split(tmp_path):
    assert len(rows(write(tmp_path / "a.csv", "text\nx\n"), split="test")) == 1


def test_csv_is_streamed(tmp_path):
    path = write(tmp_path / "a.csv", "text,label\n" + "x,y\n" * 50_000 + "ragged,row,here\n")
    records = read_records(str(path))
    assert next(records).origin == "a.csv:2"


def test_parquet_rows_are_counted_across_batches(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"text": [str(i) for i in range(2500)], "label": [1.0, None] * 1250})
    parquet.write_table(table, tmp_path / "a.parquet")
    read = rows(tmp_path / "a.parquet")
    assert len(read) == 2500
    assert read[-1] == ("a.parquet:2500", {"text": "2499", "label": None})


def test_saved_dataset_gives_label_names(saved_dataset):
    assert rows(saved_dataset) == [
        ("saved:1", {"text": "a", "label": "pos", "tags": ["neg", "pos"]}),
        ("saved:2", {"text": "b", "label": None, "tags": []}),
    ]
    assert len(rows(saved_dataset, split="held")) == 1
    assert len(rows(saved_dataset / "held")) == 1


def test_unknown_split_is_named_with_those_there_are(saved_dataset):
    with pytest.raises(DataError, match=r"no split 'test'\n.*it has train, held"):
        rows(saved_dataset, split="test")


def test_other_directory_is_refused(tmp_path):
    with pytest.raises(DataError, match="contains no data in a known format"):
        rows(tmp_path)
    (tmp_path / "state.json").write_text("{}")
    with pytest.raises(DataError, match="is not a saved dataset"):
        rows(tmp_path)


@pytest.mark.parametrize("source", ["no-such-dataset", "org/no-such"])
def test_hub_dataset_offline_is_a_data_error(source):
    # The variable is read when huggingface_hub is imported, so a process of its own must have it.
    script = (
        "import os; os.environ['HF_HUB_OFFLINE'] = '1'\n"
        "from deploykit.data.read import read_records; from deploykit.errors import DataError\n"
        f"try: list(read_records({source!r}))\n"
        "except DataError as error: print(error)"
    )
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert out.startswith(f"{source}: is not a file, and its split 'train' cannot be loaded from the hub")


def test_missing_package_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    (tmp_path / "state.json").write_text("{}")
    with pytest.raises(MissingDependencyError, match=r"deploykit\[finetune\]"):
        rows(tmp_path)


def test_a_pipe_is_read_once_as_a_text_and_refused_as_rows(tmp_path):
    pipe = tmp_path / "rows.csv"
    os.mkfifo(pipe)
    with pytest.raises(DataError, match="not a regular file"):
        list(read_records(str(pipe)))
    text = "a\r\nb\n" + "€" * 20_000
    writer = threading.Thread(target=lambda: pipe.write_bytes(text.encode()))
    writer.start()
    assert read_text(pipe, None) == text
    writer.join()
