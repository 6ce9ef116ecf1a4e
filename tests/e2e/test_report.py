"""``evaluate --report`` and ``finetune --temperature-scaling`` on real text."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import deploykit as api
from deploykit.artifacts import load_manifest

Deploykit = Callable[..., tuple[int, str, str]]


def test_a_report_shows_what_lies_behind_the_metrics(
    deploykit: Deploykit, checkpoint: Path, small_csv: Path, tmp_path: Path
) -> None:
    with small_csv.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))[::4]  # they are sorted by label
    data, new = tmp_path / "rows.csv", tmp_path / "new.txt"
    with data.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["text", "label", "airline"])
        writer.writeheader()
        writer.writerows({**row, "airline": f"line {i % 3}"} for i, row in enumerate(rows))
    new.write_text("Guten Morgen zusammen\n" * 40, encoding="utf-8")
    page = tmp_path / "report.html"
    words = ("evaluate", checkpoint, "--data", data, "--report", page, "--slice", "airline", "--against", new)
    code, out, err = deploykit(*words, "--json")
    assert code == 0, err
    record = json.loads(out)
    report = record["report"]
    assert {f"airline: line {i}" for i in range(3)} <= {one["slice"] for one in report["slices"]}
    assert sum(one["rows"] for one in report["slices"] if one["slice"].startswith("airline")) == len(rows)
    low, high = record["metrics"]["intervals"]["macro_f1"]
    assert low < record["metrics"]["macro_f1"] < high < 1
    assert {"calibration", "label_errors", "tied_words", "flips", "drift"} <= set(report)
    assert any(test["drifts"] for test in report["drift"]["tests"])
    assert page.read_text(encoding="utf-8").count("<svg") == 3
    for given, says in (
        ((*words,), "already exists"),
        (("evaluate", checkpoint, "--data", data, "--slice", "airline"), "are for a report"),
        ((*words[:-4], "--force", "--slice", "airport"), "has no column 'airport'"),
    ):
        code, _, err = deploykit(*given)
        assert code, says
        assert says in err


def test_a_fitted_temperature_goes_with_the_export(
    deploykit: Deploykit, make_tiny_checkpoint: Callable[..., Path], small_csv: Path, tmp_path: Path
) -> None:
    model = make_tiny_checkpoint(tmp_path / "model")
    runs = {}
    for scaled in (False, True):
        runs[scaled] = api.finetune(
            model, train=small_csv, output_dir=tmp_path / f"run-{scaled}", max_train_samples=200, max_steps=4,
            temperature_scaling=scaled,
        )  # fmt: skip
    temperature = runs[True].manifest.task.temperature  # type: ignore[attr-defined]
    assert runs[False].manifest.task.temperature == 1.0  # type: ignore[attr-defined]
    assert temperature != 1.0
    exported = api.export(runs[True].path, tmp_path / "export")
    assert load_manifest(exported.path).task.temperature == temperature  # type: ignore[attr-defined]
    texts = ["w1 w2 w3", "w9"]
    with api.load(exported.path) as model_, api.load(runs[False].path) as plain:
        scores = plain.predictor.scores(texts)  # type: ignore[attr-defined]
        logits = np.log(scores) / temperature
        expected = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        assert model_.predictor.scores(texts) == pytest.approx(expected, abs=1e-4)  # type: ignore[attr-defined]
    code, _, err = deploykit("finetune", model, "--train", small_csv, "--output-dir", tmp_path / "x", "--temperature-scaling",
                             "--validation-fraction", 0)  # fmt: skip
    assert code == 2
    assert "--temperature-scaling needs validation rows" in err
