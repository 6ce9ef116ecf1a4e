"""``finetune`` without options on a small model: what it chooses, says, keeps and continues."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from killed_run import kill_at_step

from deploykit.artifacts import load_manifest
from deploykit.stages.finetune_options import read_toml

Deploykit = Callable[..., tuple[int, str, str]]


def test_a_run_without_options_chooses_says_and_keeps_them(
    deploykit: Deploykit, make_tiny_checkpoint: Callable[..., Path], small_csv: Path, tmp_path: Path
) -> None:
    model, out = make_tiny_checkpoint(tmp_path / "model"), tmp_path / "run"
    words = (
        "finetune",
        model,
        "--train",
        small_csv,
        "--max-train-samples",
        300,
        "--warmup-ratio",
        0,
        "--output-dir",
        out,
    )
    # Choices depend on the rows, so a killed run finds the same ones, and goes on.
    kill_at_step(100, *words)
    assert not out.exists()
    code, _, err = deploykit(*words)
    assert code == 0, err
    assert "continuing the unfinished run" in err
    assert "  300 of them are used (--max-train-samples)\n" in err
    said = err[err.index("recipe:") :].splitlines()[1:6]
    assert [line[2:16].strip() for line in said] == [
        "learning rate",
        "epochs",
        "batch, rows",
        "warm-up",
        "length, tokens",
    ]
    assert said[0].endswith(
        "0.0005   0.04 / hidden size 32 of an encoder, times 2/3 for more than 10 epochs, between 1e-05 and 0.0005"
    )
    assert said[3].endswith("0        given")
    kept = read_toml(out / "finetune.toml")
    assert (kept["learning_rate"], kept["num_train_epochs"], kept["per_device_train_batch_size"], kept["max_length"]) == (
        5e-4, 20, 16, 32,
    )  # fmt: skip
    recipe = load_manifest(out, "checkpoint").metrics["recipe"]
    assert recipe["warmup_ratio"] == {"value": 0.0, "reason": "given"}
    # Both ways to ask for this run find it, and a run with another value is another one.
    for again in (words, ("finetune", "--config", out / "finetune.toml", "--output-dir", out)):
        code, stdout, err = deploykit(*again, "--json")
        assert code == 0, err
        assert json.loads(stdout)["reused"]
        assert json.loads(stdout)["recipe"] == recipe
    code, _, err = deploykit(*words, "--learning-rate", "1e-3")
    assert code == 1
    assert "made from other inputs or options" in err


def test_a_run_says_what_is_seldom_meant(
    deploykit: Deploykit, make_tiny_checkpoint: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Labels of two spellings, texts with several labels, texts that are cut, few rows to measure on."""
    rows = [
        f"film {i} was {word} and long,{label}"
        for i in range(12)
        for word, label in (("fine", "good"), ("poor", "bad"))
    ]
    rows += ["film 0 was fine and long,Good", "film 1 was fine and long,N/A"]
    (tmp_path / "a.csv").write_text("\n".join(["text,label", *rows, "other film,Good"]) + "\n")
    code, out, err = deploykit(
        "finetune", make_tiny_checkpoint(tmp_path / "model"), "--train", tmp_path / "a.csv", "--max-steps", 2,
        "--max-length", 4, "--output-dir", tmp_path / "run",
    )  # fmt: skip
    assert code == 0, err
    assert "4 of 27 rows have the text of another row with another label" in caplog.text
    assert "'good' (12 rows), 'Good' (2 rows); write them alike" in caplog.text
    assert "texts have 4 tokens or more: what is beyond is not read (--max-length)" in err
    assert "so few rows say little: give more with --test" in out


def test_a_search_starts_from_what_a_run_would_choose(
    deploykit: Deploykit, make_tiny_checkpoint: Callable[..., Path], small_csv: Path, tmp_path: Path
) -> None:
    model, out = make_tiny_checkpoint(tmp_path / "model"), tmp_path / "best"
    code, stdout, err = deploykit("finetune", model, "--train", small_csv, "--max-train-samples", 200, "--max-steps", 4,
                                  "--output-dir", out, "--search", 2, "--json")  # fmt: skip
    assert code == 0, err
    found = json.loads(stdout)["search"]
    assert found["runs"][0]["options"] | {"weight_decay": 0.01, "warmup_ratio": 0.1} == {
        "learning_rate": pytest.approx(5e-4), "per_device_train_batch_size": 16, "weight_decay": 0.01, "warmup_ratio": 0.1,
    }  # fmt: skip
    assert found["space"]["learning_rate"]["low"] == pytest.approx(5e-5)
