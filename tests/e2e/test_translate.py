"""The commands `deploykit translate` and `evaluate` on a small random model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from deploykit.data import answer_file as answers

Deploykit = Callable[..., tuple[int, str, str]]

LINES = [
    "The file could not be saved.",
    "",
    "Delete %s?",
    "   ",
    "tab\tand\x00control",
    "!!!",
    "Ünïcode 😀 שלום 你好",
    "",
    "end",
]


@pytest.fixture(scope="module")
def translator(make_tiny_translation: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_translation(tmp_path_factory.mktemp("translator") / "export", max_length=32)


def test_a_text_has_a_translation(deploykit: Deploykit, translator: Path) -> None:
    code, out, err = deploykit("translate", translator, "The file.", "", "--json", "--num-beams", 2)
    assert code == 0, err
    first, second = json.loads(out)["results"]
    assert set(first) == {"origin", "text", "translation", "score", "source_tokens", "target_tokens", "finish"}
    assert first["target_tokens"] > 0
    assert first["finish"] in ("eos", "length")
    assert (second["translation"], second["target_tokens"]) == ("", 0)


def test_a_file_keeps_its_lines(deploykit: Deploykit, translator: Path, tmp_path: Path) -> None:
    source = tmp_path / "lines.txt"
    source.write_text("\n".join(LINES) + "\n", encoding="utf-8")
    code, out, err = deploykit("translate", translator, "--input", source, "--output", tmp_path / "o.txt", "--json")
    assert code == 0, err
    assert json.loads(out)["rows"] == len(LINES)
    lines = (tmp_path / "o.txt").read_text(encoding="utf-8").split("\n")
    assert len(lines) == len(LINES) + 1
    assert [i for i, line in enumerate(LINES) if not line.strip()] == [1, 3, 7]
    assert not any(lines[i] for i in (1, 3, 7))
    code, _, err = deploykit("translate", translator, "--input", source, "--output", tmp_path / "o.jsonl")
    assert code == 0, err
    records = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [" ".join(r["translation"].split()) for r in records] == [" ".join(line.split()) for line in lines[:-1]]
    code, _, err = deploykit("translate", translator, "--input", source, "--output", tmp_path / "o.txt")
    assert code == 1
    assert "--force" in err


def test_translations_that_were_cut_off_are_counted(deploykit: Deploykit, translator: Path, tmp_path: Path) -> None:
    source = tmp_path / "lines.txt"
    source.write_text("The file could not be saved.\n\nDelete %s?\n")
    words = ("translate", "--model", translator, "--max-new-tokens", 2, "--min-new-tokens", 2)
    code, out, _ = deploykit(*words, "--input", source, "--output", tmp_path / "o.txt")
    assert code == 0
    assert "2 of 3 translations were cut off at the length limit of 2 tokens" in out
    code, out, err = deploykit(*words, "The file could not be saved.", "--json")
    assert json.loads(out)["finish"] == {"length": 1}
    assert "1 of 1 translations were cut off" in err


def test_the_lines_of_a_text_are_kept_in_records(deploykit: Deploykit, translator: Path, tmp_path: Path) -> None:
    source = tmp_path / "rows.jsonl"
    source.write_text(json.dumps({"text": "The file.\n\nDelete %s?"}) + "\n")
    words = ("translate", "--model", translator, "--input", source, "--max-new-tokens", 3)
    for name in ("o.jsonl", "o.txt"):
        code, _, err = deploykit(*words, "--output", tmp_path / name)
        assert code == 0, err
    [record] = map(json.loads, (tmp_path / "o.jsonl").read_text().splitlines())
    assert record["translation"].count("\n") == 2
    assert (tmp_path / "o.txt").read_text().count("\n") == 1, "a line for each row"


def test_rows_of_another_model_are_not_resumed(
    deploykit: Deploykit, make_tiny_translation: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, model = tmp_path / "lines.txt", tmp_path / "model"
    source.write_text("\n".join(f"line {i}" for i in range(1100)) + "\n")
    words = ("translate", "--model", model, "--input", source, "--max-new-tokens", 1, "--output", tmp_path / "o.txt")
    make_tiny_translation(model, max_length=16)
    original, parts = answers._chunks, []

    def two_chunks(rows: object, size: int) -> object:
        for part in original(rows, size):  # type: ignore[arg-type]
            parts.append(part)
            if len(parts) == 2:
                raise KeyboardInterrupt
            yield part

    monkeypatch.setattr(answers, "_chunks", two_chunks)
    assert deploykit(*words)[0] == 130
    monkeypatch.setattr(answers, "_chunks", original)
    model.rename(tmp_path / "old")
    make_tiny_translation(model, max_length=16, seed=1)
    code, _, err = deploykit(*words)
    assert code == 1
    assert "512 rows of it, from another model" in err
    assert not (tmp_path / "o.txt").exists()


def test_a_killed_translation_of_a_file_is_resumed(
    deploykit: Deploykit, translator: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "lines.txt"
    source.write_text("\n".join(f"line {i}" for i in range(40)) + "\n")
    words = ("translate", translator, "--input", source, "--max-new-tokens", 5, "--json")
    assert deploykit(*words, "--output", tmp_path / "whole.txt")[0] == 0
    whole = (tmp_path / "whole.txt").read_text()

    original = answers._appending

    def killed(partial: Path) -> object:
        records = [json.dumps({"translation": line}) for line in whole.splitlines()[:25]]
        partial.write_text("\n".join([*records, '{"half a li']))
        raise KeyboardInterrupt

    monkeypatch.setattr(answers, "_appending", killed)
    assert deploykit(*words, "--output", tmp_path / "again.txt")[0] == 130
    monkeypatch.setattr(answers, "_appending", original)
    code, out, err = deploykit(*words, "--output", tmp_path / "again.txt")
    assert code == 0, err
    assert json.loads(out)["resumed"] == 25
    assert (tmp_path / "again.txt").read_text() == whole


def test_a_long_text_is_split_or_refused(deploykit: Deploykit, translator: Path, tmp_path: Path) -> None:
    long = "The file could not be saved. " * 2000
    code, out, err = deploykit("translate", translator, long, "--max-new-tokens", 4, "--json")
    assert code == 0, err
    (split,) = json.loads(out)["results"]
    assert split["source_tokens"] > 32 * 10, "nothing is cut off"
    code, _, err = deploykit("translate", translator, long, "--split", "none", "--long-input", "refuse")
    assert code == 1
    assert "the model takes 32" in err
    source = tmp_path / "lines.txt"
    source.write_text(f"short\n{'word ' * 10_000}\nalso short\n")
    code, out, err = deploykit("translate", translator, "--input", source, "--output", tmp_path / "o.jsonl",
                               "--long-input", "refuse", "--json")  # fmt: skip
    assert code == 1, err
    assert "lines.txt:2: " in err
    assert json.loads(out)["errors"] == 1
    records = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    assert ["error" in record for record in records] == [False, True, False]


@pytest.mark.parametrize(
    ("words", "named", "code"),
    [
        (("--num-beams", 0), "num_beams is 0", 2),
        (("--num-beams", 10_000), "num_beams is 10000", 2),
        (("--max-new-tokens", 32), "max_new_tokens is 32", 2),
        (("--length-penalty", "nan"), "length_penalty", 2),
        (("--engine", "openvino"), "does not run translation", 2),
        (("--precision", "int8"), "has no int8 graph", 1),
    ],
)
def test_impossible_options_are_named(
    deploykit: Deploykit, translator: Path, words: tuple[object, ...], named: str, code: int
) -> None:
    got, _, err = deploykit("translate", translator, "text", *words)
    assert (got, named in err) == (code, True), err


def test_a_model_of_the_other_task_is_refused(deploykit: Deploykit, translator: Path, tiny_export: Path) -> None:
    code, _, err = deploykit("translate", tiny_export, "text")
    assert code == 2
    assert "deploykit predict" in err


def test_predict_answers_as_translate_does(deploykit: Deploykit, translator: Path, tmp_path: Path) -> None:
    texts = ("Save the file before you close the window.", "The quick brown fox.")
    code, out, err = deploykit("translate", translator, *texts)
    assert code == 0, err
    assert deploykit("predict", translator, *texts).out == out

    rows = tmp_path / "rows.csv"
    rows.write_text("en,fr\n" + "".join(f"{text},x\n" for text in texts))
    words = (translator, "--input", rows, "--output", tmp_path / "a.jsonl", "--source-column", "en")
    code, out, err = deploykit("predict", *words)
    assert code == 0, err
    records = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert [record["text"] for record in records] == list(texts)
    assert all(set(record) == {"origin", "text", "translation", "source_tokens", "target_tokens", "finish"}
               for record in records)  # fmt: skip
    code, _, err = deploykit("predict", translator, "text", "--text-column", "en")
    assert code == 2
    assert "--text-column does not apply to a model that translates" in err


def test_evaluate_counts_placeholders(deploykit: Deploykit, translator: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.tsv"
    rows.write_text("en\tfr\nDelete %s?\tSupprimer %s ?\nSave {name}\tEnregistrer {name}\n\tvide\n")
    code, out, err = deploykit("evaluate", translator, "--data", rows, "--json")
    assert code == 1
    assert "rows.tsv:4: the text is missing" in err
    record = json.loads(out)
    assert (record["rows"], record["skipped"]) == (2, 1)
    assert set(record["metrics"]) == {"bleu", "chrf", "intervals", "signatures", "placeholders"}
    assert record["metrics"]["placeholders"]["checked"] == 2
    code, _, err = deploykit("evaluate", translator, "--data", rows, "--label-column", "x")
    assert code == 2
    assert "--label-column" in err
