"""Training on all rows: nothing is held out, so nothing is evaluated or measured, and the run says so."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import language_models
import pytest
import tiny_answerer

from deploykit.artifacts import load_manifest
from deploykit.tasks.text_generation.chat_template import CHATML

Deploykit = Callable[..., tuple[int, str, str]]


def _base_and_rows(task: str, folder: Path, make_tiny_checkpoint: Callable[..., Path]) -> tuple[list[object], Path]:
    """Return the words that name a checkpoint of ``task``, and a file of rows for it."""
    rows = folder / "rows.jsonl"
    if task == "classification":
        lines = [{"text": f"w{i} w{i + 1}", "label": "good" if i % 2 else "bad"} for i in range(20)]
        rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return [make_tiny_checkpoint(folder / "base")], rows
    if task == "question-answering":
        rows = folder / "rows.json"
        rows.write_text(json.dumps(tiny_answerer.squad(contexts=8, questions=2)))
        tiny_answerer.write_checkpoint(folder / "base")
        return [folder / "base", "--max-length", 48, "--doc-stride", 12], rows
    if task == "text-generation":
        language_models.write_checkpoint(folder / "base", template=CHATML)
        return [folder / "base", "--mixed-precision", "no", "--batch-tokens", 512], language_models.write_rows(rows)
    names = [f"{deed}\t{done}" for deed, done in zip("abcdefghijklmnop", "bcdefghijklmnopq")]
    lines = [f"Open the file {a}.\tOuvrir le fichier {b}." for a, b in (name.split("\t") for name in names)]
    rows = folder / "rows.tsv"
    rows.write_text("en\tfr\n" + "\n".join(lines) + "\n")
    words = ["--from-config", "marian-tiny", "--source-lang", "en", "--target-lang", "fr", "--max-length", 32]
    return words, rows


@pytest.mark.parametrize("task", ["classification", "question-answering", "text-generation", "translation"])
def test_a_run_may_hold_out_no_rows(
    deploykit: Deploykit, make_tiny_checkpoint: Callable[..., Path], tmp_path: Path, task: str
) -> None:
    base, rows = _base_and_rows(task, tmp_path, make_tiny_checkpoint)
    code, out, err = deploykit(
        "finetune", "--task", task, *base, "--train", rows, "--output-dir", tmp_path / "run", "--max-steps", 2,
        "--validation-fraction", 0, "--test-fraction", 0, "--json",
    )  # fmt: skip
    assert code == 0, err
    assert "no validation rows: no step is evaluated" in err
    record = json.loads(out)
    assert record["metrics"] is None
    assert (record["rows"]["validation"], record["rows"]["test"]) == (0, 0)
    assert record["rows"]["train"] > 10
    assert sorted(path.name for path in (tmp_path / "run" / "splits").iterdir()) == ["train.jsonl"]
    assert "Results: not measured" in (tmp_path / "run" / "README.md").read_text()
    assert not {"validation", "test"} & {*load_manifest(tmp_path / "run", "checkpoint").metrics}
