"""The options that say how a file of rows is read: --delimiter, --quoting, --no-header, --columns."""

import gzip
from pathlib import Path

import pytest

from deploykit.data.read import read_records, reading_notes
from deploykit.data.reading import Reading
from deploykit.data.texts import read_texts
from deploykit.errors import DataError, UsageError
from deploykit.graphs.export_options import CalibrationOptions, ExportOptions
from deploykit.stages.export import command_of
from deploykit.stages.finetune_options import make_options, read_toml
from deploykit.tasks.translation.rows import load_pairs
from deploykit.training.options import write_toml


def values(path: Path, **options: object) -> list[tuple[object, ...]]:
    reading = Reading(**options)
    reading.check()
    return [tuple(record.values.values()) for record in read_records(str(path), reading)]


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8", newline="")
    return path


def test_a_given_delimiter_wins_over_the_one_in_the_header(tmp_path):
    path = write(tmp_path / "a.csv", "te,xt^label\na, b^x\n")
    assert [dict(r.values) for r in read_records(str(path), Reading(delimiter="^"))] == [
        {"te,xt": "a, b", "label": "x"}
    ]


def test_quoting_none_takes_quotes_as_characters_where_minimal_would_be_found(tmp_path):
    path = write(tmp_path / "a.csv", 'text,label\n"a",x\n"b,x\nc",y\n')
    assert values(path, quoting="none") == [('"a"', "x"), ('"b', "x"), ('c"', "y")]
    assert values(path, quoting="minimal") == [("a", "x"), ("b,x\nc", "y")]


def test_quoting_minimal_wins_over_what_the_labels_tell(tmp_path):
    lines = [f"text {i},{'pos' if i % 2 else 'neg'}" for i in range(60)]
    lines[10], lines[30] = '"tis the season,pos', "a 5'10\",neg"
    path = write(tmp_path / "a.csv", "text,label\n" + "\n".join(lines) + "\n")
    assert len(values(path)) == 60
    assert len(values(path, quoting="minimal")) == 40


def test_a_file_without_a_header_loses_no_row(tmp_path):
    path = write(tmp_path / "a.csv", "good,pos\ngood,pos\ntext,label\n")
    assert values(path, no_header=True) == [("good", "pos"), ("good", "pos"), ("text", "label")]
    records = list(read_records(str(path), Reading(no_header=True, columns=("text", "label"))))
    assert dict(records[2].values) == {"text": "text", "label": "label"}
    assert records[0].origin == "a.csv:1"
    assert reading_notes(str(path), Reading(no_header=True)) == ["no header; the columns are '1', '2'"]


def test_a_compressed_file_and_a_workbook_without_a_header(tmp_path):
    reading = {"no_header": True, "columns": ("text", "label")}
    (tmp_path / "a.tsv.gz").write_bytes(gzip.compress(b"a\tx\nb\ty\n"))
    assert values(tmp_path / "a.tsv.gz", **reading) == [("a", "x"), ("b", "y")]
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    for row in (("a", "x"), ("b", "y")):
        book.active.append(row)
    book.save(tmp_path / "a.xlsx")
    assert values(tmp_path / "a.xlsx", **reading) == [("a", "x"), ("b", "y")]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"delimiter": ";;"}, "--delimiter is ';;'"),
        ({"delimiter": ""}, "--delimiter is ''"),
        ({"delimiter": '"'}, "--delimiter"),
        ({"quoting": "all"}, "--quoting is 'all'"),
        ({"columns": ("a", "b")}, "without a header"),
        ({"no_header": True, "columns": ("a", "a")}, "--columns is 'a,a'"),
        ({"no_header": True, "columns": ("a", "")}, "--columns is 'a,'"),
        ({"no_header": True, "columns": ("a", "b", "c")}, "names 3 columns, and the first row of .*a.csv has 2 fields"),
    ],
)
def test_wrong_options_are_usage_errors(tmp_path, options, message):
    with pytest.raises(UsageError, match=message):
        values(write(tmp_path / "a.csv", "x,y\n"), **options)


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.json"])
@pytest.mark.parametrize("options", [{"delimiter": ";"}, {"quoting": "none"}, {"no_header": True}])
def test_options_for_tables_are_refused_for_other_files(tmp_path, name, options):
    path = write(tmp_path / name, '[{"text": "a"}]' if name == "a.json" else '{"text": "a"}\n')
    option = f"--{next(iter(options)).replace('_', '-')}"
    with pytest.raises(UsageError, match=f"{option} is for .csv.* files, not .*{name}"):
        list(read_texts(str(path), reading=Reading(**options)))


def test_options_for_tables_are_refused_for_parquet_and_catalogs(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"text": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(UsageError, match=r"--delimiter is for .csv and .tsv files"):
        values(tmp_path / "a.parquet", delimiter=";")
    catalog = write(tmp_path / "a.po", 'msgid "a"\nmsgstr "b"\n')
    with pytest.raises(UsageError, match="--no-header"):
        load_pairs(str(catalog), source="en", target="fr", reading=Reading(no_header=True))


def test_pairs_without_a_header_are_read_by_the_names_given(tmp_path):
    path = write(tmp_path / "a.csv", "Hello|Bonjour\nBye|Salut\n")
    reading = Reading(delimiter="|", no_header=True, columns=("en", "fr"))
    pairs, _ = load_pairs(str(path), source="en", target="fr", reading=reading)
    assert [(pair.source, pair.target) for pair in pairs] == [("Hello", "Bonjour"), ("Bye", "Salut")]


def test_a_lone_carriage_return_ends_no_row(tmp_path):
    assert values(write(tmp_path / "a.tsv", "text\tlabel\na\rb\tx\nc\ty\n"), quoting="none") == [
        ("a\rb", "x"),
        ("c", "y"),
    ]
    with pytest.raises(DataError, match="line 2 is malformed: a carriage return"):
        values(write(tmp_path / "a.csv", "text,label\na\rb,x\nc,y\n"))
    texts = [row.text for row in read_texts(str(write(tmp_path / "a.txt", "a\rb\nc\n")))]
    assert texts == ["a\rb", "c"]


def test_carriage_returns_end_the_rows_of_a_file_that_has_no_other_ends(tmp_path):
    assert values(write(tmp_path / "a.csv", "text,label\ra,x\rb,y\r")) == [("a", "x"), ("b", "y")]
    assert [row.text for row in read_texts(str(write(tmp_path / "a.txt", "a\rb\r")))] == ["a", "b"]


def test_a_run_keeps_the_options(tmp_path):
    given = {"train": "a.csv", "model": "m", "delimiter": "\t", "quoting": "none", "no_header": True}
    options = make_options({**given, "columns": ["text", "label"]})
    write_toml(options, tmp_path / "finetune.toml")
    assert make_options(read_toml(tmp_path / "finetune.toml")) == options
    assert options.columns == ("text", "label")
    with pytest.raises(UsageError, match="--delimiter"):
        make_options({**given, "delimiter": "ab"}).check()


def test_an_export_keeps_the_options_and_wants_a_file_for_them(tmp_path):
    options = ExportOptions(data="a.csv", no_header=True, columns=("text", "label"), delimiter="\t")
    options.check()
    command = command_of(Path("c"), Path("o"), options)
    assert "--no-header --columns text,label" in command
    assert "--delimiter '\t'" in command
    with pytest.raises(UsageError, match="--encoding is for a file of rows, not the rows of a run"):
        CalibrationOptions(encoding="latin-1").check()
