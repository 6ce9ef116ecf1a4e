"""The docs page on the Python API runs as written, on models small enough to train in seconds."""

from __future__ import annotations

import csv
import random
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from language_models import write_export
from paths import ROOT

import deploykit
from deploykit.tasks.text_generation.chat_template import CHATML

PAGE = ROOT / "docs" / "python-api.md"
MOODS = ("negative", "neutral", "positive")


def _write_tweets(path: Path) -> None:
    """Write texts whose words tell the label, under the columns of the tweets that the docs use."""
    generator = random.Random(0)
    with path.open("w", encoding="latin-1", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["sentiment", "text"])
        for number in range(900):
            mood = number % 3
            words = [f"w{60 * mood + generator.randrange(60)}" for _ in range(generator.randrange(4, 20))]
            writer.writerow([MOODS[mood], " ".join([*words, f"w{180 + generator.randrange(20)}"])])


def test_the_page_on_the_python_api_works(
    make_tiny_checkpoint: Callable[..., Path],
    make_tiny_translation: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    make_tiny_checkpoint(tmp_path / "minilm", positions=80)
    make_tiny_translation(tmp_path / "exports" / "fr")
    write_export(tmp_path / "exports" / "lm", template=CHATML)
    _write_tweets(tmp_path / "tweets.csv")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert len(blocks[0].splitlines()) <= 20, "all stages in 20 lines"
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    shown = capsys.readouterr().out.splitlines()

    run, exported = names["run"], names["exported"]
    assert isinstance(run, deploykit.Finetuned)
    assert isinstance(exported, deploykit.Exported)
    assert not run.reused
    assert [line["precision"] for line in exported.manifest.metrics["accuracy_table"]].count("int8") >= 2
    label, score = shown[0].split()
    assert label in MOODS
    assert 1 / 3 <= float(score) <= 1
    assert float(shown[2]) == pytest.approx(exported.manifest.metrics["accuracy_table"][-1]["macro_f1"], abs=0.02)
    assert shown[4].startswith("http://127.0.0.1:")
    assert "Answer(text=" in shown[4]
    assert shown[5].rsplit(" ", 1)[-1] in ("eos", "length")

    # Commands and API reuse each other's artifacts.
    again = deploykit.finetune(
        "minilm", train="tweets.csv", encoding="latin-1", output_dir="runs/a",
        max_train_samples=2000, num_train_epochs=1, max_length=64, learning_rate=1e-4,
    )  # fmt: skip
    assert again.reused
    assert again.manifest.digest == run.manifest.digest
