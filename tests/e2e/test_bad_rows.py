"""A bad row of a file or a command line: it fails alone, with its name and the reason, or the command stops."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import language_models
import pytest
import tiny_answerer

Deploykit = Callable[..., tuple[int, str, str]]
BAD = "{not json}"


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Good, malformed, without a text, empty, good."""
    path = tmp_path / "rows.jsonl"
    lines = [json.dumps({"text": text, "label": "neutral"}) for text in ("w1 w2", None, "", "w3")]
    path.write_text("\n".join([lines[0], BAD, *lines[1:]]) + "\n")
    return path


def test_predict_skips_bad_rows_and_names_them(deploykit: Deploykit, tiny_export: Path, rows: Path) -> None:
    out = rows.with_name("out.jsonl")
    code, said, err = deploykit("predict", tiny_export, "--input", rows, "--output", out, "--json")
    assert code == 1
    assert {**json.loads(said), "output": ""} == {"output": "", "rows": 5, "errors": 2, "resumed": 0}
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [record["origin"] for record in records] == [f"rows.jsonl:{n}" for n in range(1, 6)]
    assert ["error" in record for record in records] == [False, True, True, False, False]
    assert records[3]["text"] == ""
    assert "rows.jsonl:2: " in err
    assert "line 2 is not JSON" in err
    assert "rows.jsonl:3: the text is missing" in err
    _, alone, _ = deploykit("predict", tiny_export, "w3", "--json")
    assert json.loads(alone)["results"][0]["scores"] == records[4]["scores"]


def test_a_table_of_answers_keeps_each_in_its_row(deploykit: Deploykit, tiny_export: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("text,id\nw1,1\nw2,2,3\nw3,4\n")
    out = tmp_path / "out.csv"
    assert deploykit("predict", tiny_export, "--input", tmp_path / "rows.csv", "--output", out)[0] == 1
    with out.open(newline="") as file:
        answers = list(csv.DictReader(file))
    assert [(row["id"], bool(row["label"]), bool(row["error"])) for row in answers] == [
        ("1", True, False), ("", False, True), ("4", True, False),
    ]  # fmt: skip


@pytest.mark.parametrize("output", ["rows.jsonl", ".", "answers"])
def test_answers_are_not_written_over_their_rows(
    deploykit: Deploykit, tiny_export: Path, rows: Path, tmp_path: Path, output: str
) -> None:
    """A second run would read answers in the folder of the rows as rows."""
    before = rows.read_text()
    source = rows if output == rows.name else tmp_path
    code, _, err = deploykit("predict", tiny_export, "--input", source, "--output", tmp_path / output, "--force")
    assert (code, rows.read_text()) == (2, before)
    assert "is what --input reads" in err
    assert [path.name for path in tmp_path.iterdir()] == [rows.name]


def test_stop_fails_before_any_work_and_skip_goes_on(deploykit: Deploykit, tiny_export: Path, rows: Path) -> None:
    out = rows.with_name("out.jsonl")
    words = ("predict", tiny_export, "--input", rows, "--output", out)
    code, _, err = deploykit(*words, "--on-error", "stop")
    assert code == 1
    assert "line 2 is not JSON" in err
    assert [path.name for path in rows.parent.iterdir()] == ["rows.jsonl"]
    rows.write_text('{"text": "w1"}\n{"text": null}\n')
    code, _, err = deploykit(*words, "--on-error", "stop")
    assert code == 1
    assert "rows.jsonl:2: the text is missing" in err
    assert "--on-error skip" in err
    assert deploykit(*words)[0] == 1
    assert len(out.read_text().splitlines()) == 2


def test_evaluate_measures_the_other_rows(deploykit: Deploykit, tiny_export: Path, rows: Path) -> None:
    code, said, err = deploykit("evaluate", tiny_export, "--data", rows, "--json")
    assert code == 1
    record = json.loads(said)
    assert (record["rows"], record["skipped"]) == (3, 2)
    assert "rows.jsonl:3: the text is missing" in err
    code, said, err = deploykit("evaluate", tiny_export, "--data", rows, "--on-error", "stop")
    assert (code, said) == (1, "")
    assert "line 2 is not JSON" in err


def test_texts_of_the_command_line_fail_alone(deploykit: Deploykit, tiny_export: Path) -> None:
    long = "w1 " * 400_000
    code, said, _ = deploykit("predict", tiny_export, "w1", long, "", "--json")
    assert code == 1
    assert ["error" in record for record in json.loads(said)["results"]] == [False, True, False]
    code, said, err = deploykit("predict", tiny_export, "w1", long, "--on-error", "stop")
    assert (code, said) == (1, "")
    assert "text 2: the text has 1,200,000 characters" in err


def test_translate_leaves_a_line_for_each_row(deploykit: Deploykit, tiny_translation: Path, tmp_path: Path) -> None:
    source, out = tmp_path / "rows.jsonl", tmp_path / "out.txt"
    source.write_text('{"en": "Save the file."}\n' + BAD + '\n{"en": ""}\n{"en": "Save the file."}\n')
    words = ("translate", tiny_translation, "--input", source, "--output", out, "--max-new-tokens", 4)
    code, _, err = deploykit(*words)
    assert code == 1
    assert "rows.jsonl:2: " in err
    lines = out.read_text().split("\n")
    assert lines[1:3] == ["", ""]
    assert lines[0] == lines[3] != ""
    assert len(lines) == 5  # the last one ends
    out.unlink()
    assert deploykit(*words, "--on-error", "stop")[0] == 1
    assert not out.exists()


def test_answer_and_generate_skip_bad_rows(deploykit: Deploykit, tmp_path: Path) -> None:
    tiny_answerer.write_checkpoint(tmp_path / "qa")
    good = {"question": "after w1 ?", "context": "w1 w2 w3"}
    source = tmp_path / "questions.jsonl"
    source.write_text("\n".join([json.dumps(good), json.dumps({**good, "answers": 3}), json.dumps(good)]) + "\n")
    code, _, err = deploykit("answer", tmp_path / "qa", "--input", source, "--output", tmp_path / "a.jsonl")
    assert code == 1
    assert "questions.jsonl:2: " in err
    records = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert ["error" in record for record in records] == [False, True, False]
    assert records[0]["answer"] == records[2]["answer"]

    language_models.write_checkpoint(tmp_path / "lm")
    source = tmp_path / "prompts.jsonl"
    source.write_text('{"prompt": "list files"}\n{"prompt": null}\n{"prompt": "list files"}\n')
    words = ("generate", tmp_path / "lm", "--input", source, "--output", tmp_path / "g.jsonl", "--max-new-tokens", 3)
    code, _, err = deploykit(*words)
    assert code == 1
    assert "prompts.jsonl:2: the prompt is missing" in err
    records = [json.loads(line) for line in (tmp_path / "g.jsonl").read_text().splitlines()]
    assert records[0]["answer"] == records[2]["answer"]


def test_finetune_stops_at_a_malformed_row_and_counts_it_if_told_to_skip(
    deploykit: Deploykit, make_tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    make_tiny_checkpoint(tmp_path / "base")
    rows = tmp_path / "rows.jsonl"
    lines = [json.dumps({"text": f"w{i}", "label": "good" if i % 2 else "bad"}) for i in range(20)]
    rows.write_text("\n".join([*lines, BAD]) + "\n")
    words = ("finetune", tmp_path / "base", "--train", rows, "--output-dir", tmp_path / "run", "--max-steps", 1)
    code, _, err = deploykit(*words)
    assert code == 1
    assert "line 21 is not JSON" in err
    code, _, err = deploykit(*words, "--on-error", "skip")
    assert code == 0, err
    assert "1 without a text dropped" in err
