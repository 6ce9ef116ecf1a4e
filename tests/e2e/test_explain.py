"""``deploykit explain`` on a trained classifier and on a model that answers questions."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path

import language_models
import pytest
from tiny_answerer import write_checkpoint

from deploykit.tasks.text_generation.chat_template import CHATML

Deploykit = Callable[..., tuple[int, str, str]]


@pytest.mark.parametrize("method", ["auto", "occlusion"])
def test_top_words_move_the_answer_more_than_random_ones(
    method: str, deploykit: Deploykit, checkpoint: Path, tmp_path: Path
) -> None:
    page = tmp_path / "page.html"
    words = (
        "explain",
        checkpoint,
        "--rows",
        checkpoint / "splits" / "test.jsonl",
        "--num-prompts",
        24,
        "--output",
        page,
        "--method",
        method,
    )
    code, out, err = deploykit(*words, "--json")
    assert code == 0, err
    record = json.loads(out)
    assert len(record["explanations"]) == 24
    assert record["explanations"][0]["method"] == {"auto": "integrated gradients"}.get(method, method)
    curves = [one["deletion"] for one in record["explanations"]]
    gains = [sum(r - t for r, t in zip(curve["random"], curve["top"])) / 4 for curve in curves]
    assert record["deletion"]["gain"] == pytest.approx(statistics.mean(gains), abs=1e-9)
    assert statistics.mean(gains) > 3 * statistics.stdev(gains) / len(gains) ** 0.5, "beyond chance"
    assert page.read_text(encoding="utf-8").count("<svg") == 1
    assert set(record["words"]) <= {"negative", "neutral", "positive"}
    code, _, err = deploykit(*words)
    assert code == 2
    assert "already exists" in err


def test_the_context_of_an_answer_is_explained(deploykit: Deploykit, tmp_path: Path) -> None:
    model, context = write_checkpoint(tmp_path / "m", sharp=True), tmp_path / "context.txt"
    context.write_text("w1 w2 w3 w4 w5 w6 w7 w8")
    code, out, err = deploykit("explain", model, "which w9", "--context", context, "--json")
    assert code == 0, err
    record = json.loads(out)
    (found,) = record["explanations"]
    explained = [word["text"] for word in found["words"]]
    assert explained[:2] == ["which", "w9"]
    assert not {*explained[2:]} & {*found["answer"].split()}, "the answer itself stays"
    assert {*explained[2:], *found["answer"].split()} == {f"w{i}" for i in range(1, 9)}
    assert record["deletion"]["gain"] > 0
    code, _, err = deploykit("explain", model, "which", "--context", context, "--answer", "w50")
    assert code == 1
    assert "'w50' is not among the 20 best answers" in err
    code, _, err = deploykit("explain", model, "which", "--context", context, "--method", "gradients")
    assert code == 2
    assert "only occlusion explains" in err


def test_generated_answers_and_translations_are_explained(
    deploykit: Deploykit, make_tiny_translation: Callable[..., Path], tmp_path: Path
) -> None:
    lm = language_models.write_checkpoint(tmp_path / "lm", template=CHATML)
    rows = language_models.write_rows(tmp_path / "rows.jsonl")
    pairs = tmp_path / "pairs.csv"
    pairs.write_text("en,fr\nSave the file.,Enregistrer le fichier.\nOpen the folder.,Ouvrir le dossier.\n")
    translator = make_tiny_translation(tmp_path / "fr")
    for model, source, more in (
        (lm, rows, ("--method", "gradients")),
        (lm, rows, ()),
        (translator, pairs, ("--source-column", "en")),
    ):
        page = tmp_path / "page.html"
        words = ("explain", model, "--rows", source, "--num-prompts", 2, "--output", page, "--force", *more)
        code, out, err = deploykit(*words, "--json")
        assert code == 0, err
        record = json.loads(out)
        assert [one["measure"] for one in record["explanations"]] == ["log-probability"] * 2
        assert set(record["words"]) == {"any answer"}
        assert 0 < record["deletion"]["top"][0] <= 1
        assert "Words with the largest weights" in page.read_text(encoding="utf-8")
    code, out, err = deploykit("explain", lm, "list the file. And here?", "--unit", "sentence", "--answer", "ls -f .")
    assert code == 0, err
    assert out.startswith("ls -f .  0.")
    assert "list the file. " in out.splitlines()[2]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((), "give texts, or --rows"),
        (("a", "--rows", "b.csv"), "give texts, or --rows"),
        (("a", "--text-pair", "b", "--text-pair", "c"), "1 texts and 2 of --text-pair"),
        (("a", "--text-pair", "b", "--context", "c"), "--context is for questions"),
    ],
)
def test_arguments_without_sense_are_refused(words: tuple[str, ...], says: str, deploykit: Deploykit) -> None:
    code, _, err = deploykit("explain", "m", *words)
    assert code == 2
    assert says in err
