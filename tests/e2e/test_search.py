"""``finetune --search`` on a small model: killed, continued, within limits."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from killed_run import kill_at_step
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

import deploykit as api
from deploykit.artifacts import load_manifest
from deploykit.hyperparameters import run as search_run
from deploykit.stages.finetune_options import read_toml

Deploykit = Callable[..., tuple[int, str, str]]


def test_a_killed_search_goes_on_and_writes_its_best_run(
    deploykit: Deploykit, make_tiny_checkpoint: Callable[..., Path], small_csv: Path, tmp_path: Path
) -> None:
    model, out = make_tiny_checkpoint(tmp_path / "model"), tmp_path / "best"
    space = tmp_path / "space.toml"
    space.write_text("learning_rate = [3e-3, 1e-5]\n")
    words = ("finetune", model, "--train", small_csv, "--max-train-samples", 300, "--max-steps", 12, "--eval-steps", 3,
             "--per-device-train-batch-size", 8, "--learning-rate", 3e-3, "--output-dir", out, "--search-space", space,
             "--search", 2, "--search-max-size", "50MB", "--json")  # fmt: skip
    kill_at_step(7, *words)
    assert not out.exists()
    code, stdout, err = deploykit(*words)
    assert code == 0, err
    assert "run 0, continued: --learning-rate 0.003" in err
    found = json.loads(stdout)["search"]
    assert [run["state"] for run in found["runs"]] == ["complete", "complete"]
    best = max(found["runs"], key=lambda run: run["value"])
    assert found["best"] == best["run"]
    assert all(0 < run["size_mb"] < 50 and run["p50_ms"] > 0 for run in found["runs"])
    assert (tmp_path / "best.search" / "report.html").is_file()
    assert [p.name for p in (tmp_path / "best.search").glob("run-*") if p.is_dir()] == [f"run-{best['run']:04}"]
    manifest = load_manifest(out, "checkpoint")
    assert manifest.metrics["validation"]["macro_f1"] == best["value"]
    assert read_toml(out / "finetune.toml")["learning_rate"] == best["options"]["learning_rate"]
    code, stdout, err = deploykit("finetune", "--config", out / "finetune.toml", "--output-dir", out, "--json")
    assert json.loads(stdout)["reused"], "the best run is an ordinary run"

    again = api.finetune(
        model, train=small_csv, max_train_samples=300, max_steps=12, eval_steps=3, per_device_train_batch_size=8,
        learning_rate=3e-3, output_dir=out, search_space={"learning_rate": [3e-3, 1e-5]}, search=2, search_max_size="50MB",
    )  # fmt: skip
    assert again.reused
    assert again.manifest.inputs == manifest.inputs
    code, _, err = deploykit(*words, "--search-objective", "recall")
    assert code == 1
    assert "is a search with other options" in err


def test_no_run_is_started_after_the_time_of_a_search(
    deploykit: Deploykit, make_tiny_checkpoint: Callable[..., Path], small_csv: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    clock = itertools.chain(
        [0.0, 59.0], itertools.repeat(61.0)
    )  # the end is set, the first run starts, time has passed
    monkeypatch.setattr(search_run, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    words = ("finetune", make_tiny_checkpoint(tmp_path / "model"), "--train", small_csv, "--max-train-samples", 200, "--max-steps",
             2, "--output-dir", tmp_path / "best", "--search", 9, "--search-time", "1m", "--json")  # fmt: skip
    code, stdout, err = deploykit(*words)
    assert code == 0, err
    assert [run["state"] for run in json.loads(stdout)["search"]["runs"]] == ["complete"]
    assert (tmp_path / "best" / "finetune.toml").is_file()
    page = (tmp_path / "best.search" / "report.html").read_text(encoding="utf-8")
    assert "1 of 9: --search-time ended the search" in page


def test_the_page_says_which_runs_a_limit_ruled_out(
    deploykit: Deploykit, make_tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    small, wide, rows = make_tiny_checkpoint(tmp_path / "small"), tmp_path / "wide", tmp_path / "rows.csv"
    config = AutoConfig.from_pretrained(small, hidden_size=256, intermediate_size=1024)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(wide)
    AutoTokenizer.from_pretrained(small).save_pretrained(wide)
    rows.write_text("text,label\n" + "".join(f"w{i} w{i % 7},{('bad', 'good')[i % 2]}\n" for i in range(80)))
    space = tmp_path / "space.toml"
    space.write_text(f"model = [{str(wide)!r}, {str(small)!r}]\n")
    words = ("finetune", wide, "--train", rows, "--max-steps", 2, "--search", 2, "--search-space", space,
             "--search-pruner", "none", "--seed", 3, "--search-max-size", "0.8MB")  # fmt: skip
    code, _, err = deploykit(*words, "--output-dir", tmp_path / "best")
    assert code == 0, err
    assert "MB, above the limit of 0.8" in err
    found = json.loads((tmp_path / "best.search" / "search.json").read_text())
    assert [run["fits"] for run in found["runs"]] == [False, True]
    assert found["best"] == 1
    page = (tmp_path / "best.search" / "report.html").read_text(encoding="utf-8")
    assert "1 of 2 finished runs; the table of all runs says why" in page
    assert f"ruled out: {found['runs'][0]['size_mb']:.1f} MB, above the limit of 0.8" in page
    code, _, err = deploykit(*words[:-1], "0.001MB", "--output-dir", tmp_path / "none")
    assert code == 1
    assert "no run is within the limits: the smallest export has" in err
    page = (tmp_path / "none.search" / "report.html").read_text(encoding="utf-8")
    assert page.count("above the limit of 0.001") == 2
