"""Synonyms, masked words and translations there and back as training rows, through the command line."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from killed_run import kill_at_step

from deploykit.artifacts import load_manifest, write_manifest

Deploykit = Callable[..., tuple[int, str, str]]
WORDS = {"bad": ("w1 w2", "w3 w4", "w5 w6"), "good": ("w101 w102", "w103 w104", "w105 w106")}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.csv"
    lines = [
        f"{' '.join(each)} w{50 + i},{label}"
        for label, words in WORDS.items()
        for each in itertools.product(words, words)
        for i in range(6)
    ]
    path.write_text("text,label\n" + "\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def masked_model(make_tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import AutoConfig, AutoModelForMaskedLM, AutoTokenizer

    path = make_tiny_checkpoint(tmp_path_factory.mktemp("mlm") / "m")
    AutoTokenizer.from_pretrained(path, mask_token="[UNK]").save_pretrained(path)
    AutoModelForMaskedLM.from_config(AutoConfig.from_pretrained(path)).save_pretrained(path)
    return path


def test_a_run_sees_copies_of_three_kinds(
    deploykit: Deploykit, masked_model: Path, rows: Path, make_tiny_translation: Callable[..., Path], tmp_path: Path
) -> None:
    there, back = make_tiny_translation(tmp_path / "en-fr"), tmp_path / "fr-en"
    shutil.copytree(there, back)
    task: Any = load_manifest(back).task
    write_manifest(back, "export", dataclasses.replace(task, source="fr", target="en"), inputs="back")
    (tmp_path / "words.txt").write_text("w1, w11\nw101, w111\n")
    out = tmp_path / "r"
    command = (
        "finetune", masked_model, "--train", rows, "--output-dir", out, "--max-steps", 4, "--eval-steps", 2,
        "--augment", "synonyms=1", "--synonyms", tmp_path / "words.txt", "--augment", "mask=0.3",
        "--augment", "back-translation=0.2", "--back-translate", there, back,
    )  # fmt: skip
    kill_at_step(3, *command)
    code, _, err = deploykit(*command, "--json")
    assert code == 0, err
    assert "continuing the unfinished run" in err
    assert "translated there and back" in err, "what the killed run has translated is kept"
    metrics = json.loads((out / "metrics.json").read_text())
    counts = metrics["augmented"]
    assert set(counts) == {"synonyms=1", "mask=0.3", "back-translation=0.2"}
    assert all(counts.values())
    assert all(f" with {noise}: " in err for noise in ("synonyms", "mask", "back-translation"))
    assert "copies of the training rows" in (out / "README.md").read_text()
    splits = "".join((out / "splits" / f"{name}.jsonl").read_text() for name in ("train", "validation", "test"))
    assert " with " not in splits, "only the training sees the copies"
    again = deploykit("finetune", masked_model, "--config", out / "finetune.toml", "--output-dir", out)
    assert again[0] == 0
    assert "reused" in again[1], "finetune.toml gives equal options"


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (("--augment", "synonyms=0.1"), 2, "apt install mythes-en-us"),
        (("--augment", "case=1", "--synonyms", "x"), 2, "--synonyms is for --augment synonyms"),
        (("--augment", "case=1", "--mask-model", "x"), 2, "--mask-model is for --augment mask"),
        (("--augment", "back-translation=1"), 2, "--back-translate FORWARD BACKWARD"),
        (("--back-translate", "a", "b"), 2, "--back-translate is for --augment back-translation"),
        (("--augment", "mask=0.1"), 2, "is not a masked language model"),
        (("--augment", "synonyms=0.1", "--synonyms", "no-such-file"), 1, "no-such-file: cannot be read"),
    ],
)
def test_what_a_noise_needs_is_named(
    words: tuple[str, ...], code: int, says: str, deploykit: Deploykit, make_tiny_checkpoint: Callable[..., Path],
    rows: Path, tmp_path: Path,
) -> None:  # fmt: skip
    model = make_tiny_checkpoint(tmp_path / "m")
    found, _, err = deploykit("finetune", model, "--train", rows, "--output-dir", tmp_path / "r", *words)
    assert (found, says in err) == (code, True), err
