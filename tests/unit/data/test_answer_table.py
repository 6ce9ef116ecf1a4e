import csv
import datetime
import json
from decimal import Decimal
from pathlib import Path

import pytest

from deploykit.data.answer_table import write_table

ROWS = [{"id": 7, "text": 'a "b", c', "label": "old"}, {"id": 8, "text": "x\ry\ud800", "tags": [1]}]
ANSWERS = [
    {"origin": "f:1", "text": "a", "label": "pos", "score": 0.75, "scores": {"pos": 0.75}},
    {"origin": "f:2", "error": "the text is empty"},
]


def written(folder: Path, name: str) -> Path:
    answers = folder / ".partial"
    answers.write_text("".join(json.dumps(record) + "\n" for record in ANSWERS))
    write_table(answers, lambda: iter(ROWS), folder / name, ("label", "score"))
    assert {path.name for path in folder.iterdir()} == {".partial", name}
    return folder / name


@pytest.mark.parametrize(("name", "delimiter"), [("a.csv", ","), ("a.tsv", "\t")])
def test_answers_stand_beside_the_columns_of_their_rows(tmp_path, name, delimiter):
    with written(tmp_path, name).open(newline="", encoding="utf-8") as file:
        first, second = csv.DictReader(file, delimiter=delimiter)
    assert first == {
        "id": "7", "text": 'a "b", c', "label": "old", "tags": "", "predicted_label": "pos", "score": "0.75",
        "scores": '{"pos": 0.75}', "error": "",
    }  # fmt: skip
    assert (second["text"], second["tags"], second["predicted_label"], second["error"]) == (
        "x\ry\ufffd", "[1]", "", "the text is empty",
    )  # fmt: skip


def test_parquet_keeps_numbers(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = parquet.read_table(written(tmp_path, "a.parquet")).to_pylist()
    assert rows[0]["id"] == 7
    assert rows[0]["score"] == 0.75
    assert rows[1]["predicted_label"] is None
    assert rows[1]["error"] == "the text is empty"


def test_as_many_answers_as_rows_or_nothing_is_written(tmp_path):
    (tmp_path / ".partial").write_text(json.dumps(ANSWERS[0]) + "\n")
    with pytest.raises(ValueError, match="shorter"):
        write_table(tmp_path / ".partial", lambda: iter(ROWS), tmp_path / "a.csv", ("label",))
    assert not (tmp_path / "a.csv").exists()


def test_a_table_whose_rows_all_failed_has_the_columns_of_answers(tmp_path):
    (tmp_path / ".partial").write_text(json.dumps(ANSWERS[1]) + "\n")
    write_table(tmp_path / ".partial", lambda: iter(ROWS[1:]), tmp_path / "a.csv", ("label", "score"))
    with (tmp_path / "a.csv").open(newline="", encoding="utf-8") as file:
        (row,) = csv.DictReader(file)
    assert (row["label"], row["score"], row["error"]) == ("", "", "the text is empty")


def table_of(folder: Path, row: dict[str, object], name: str) -> dict[str, object]:
    """Write the first answer next to ``row``, and return what the table has."""
    (folder / ".partial").write_text(json.dumps(ANSWERS[0]) + "\n")
    write_table(folder / ".partial", lambda: iter([row]), folder / name, ("label", "score"))
    if name.endswith(".parquet"):
        return pytest.importorskip("pyarrow.parquet").read_table(folder / name).to_pylist()[0]
    with (folder / name).open(newline="", encoding="utf-8") as file:
        header, cells = csv.reader(file)
    assert len(set(header)) == len(header)
    return dict(zip(header, cells))


@pytest.mark.parametrize("name", ["a.csv", "a.parquet"])
def test_the_answers_of_an_earlier_run_keep_their_columns(tmp_path, name):
    found = table_of(tmp_path, {"text": "a", "label": "true", "predicted_label": "earlier"}, name)
    assert (found["label"], found["predicted_label"], found["predicted_predicted_label"]) == ("true", "earlier", "pos")


@pytest.mark.parametrize("name", ["a.csv", "a.parquet"])
def test_dates_and_decimals_have_no_quotes(tmp_path, name):
    found = table_of(tmp_path, {"day": datetime.date(2026, 1, 2), "price": Decimal("1.50")}, name)
    assert (found["day"], found["price"]) == ("2026-01-02", "1.50")


@pytest.mark.parametrize("number", [2**63, 2**60 + 1])
def test_a_number_that_parquet_cannot_hold_is_written_as_text(tmp_path, number):
    (tmp_path / ".partial").write_text((json.dumps(ANSWERS[0]) + "\n") * 2)
    write_table(tmp_path / ".partial", lambda: iter([{"n": number}, {"n": 1.5}]), tmp_path / "a.parquet", ("label",))
    rows = pytest.importorskip("pyarrow.parquet").read_table(tmp_path / "a.parquet").to_pylist()
    assert [row["n"] for row in rows] == [str(number), "1.5"]
