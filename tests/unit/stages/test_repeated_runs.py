"""Cross-validation and learning curves: which rows are trained and measured on, and what is made of the metrics."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from language_models import write_checkpoint, write_rows

from deploykit.errors import DataError, UsageError
from deploykit.report.training_figures import write_learning_curve
from deploykit.stages import repeated_runs
from deploykit.stages.finetune import Finetuned
from deploykit.stages.finetune_options import make_options
from deploykit.stages.repeated_runs import check_repeats, cross_validate, expected, learning_curve
from deploykit.tasks.text_generation.chat_template import CHATML
from deploykit.training.options import FinetuneOptions


@pytest.fixture
def options(make_tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> FinetuneOptions:
    with (tmp_path / "rows.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        writer.writerows((f"w{i} w{i + 1} w{i + 2}", "good" if i % 3 else "bad") for i in range(150))
    return make_options({"model": str(make_tiny_checkpoint(tmp_path / "model")), "train": str(tmp_path / "rows.csv")})


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, set[str]]]:
    """The rows of each training, by split, without training."""
    runs: list[dict[str, set[str]]] = []

    def metrics(options: FinetuneOptions, rows: Any, out: Path, split: str) -> dict[str, float]:
        assert all(rows.splits.values())
        runs.append(
            {name: {getattr(row, "prompt", None) or row.text for row in part} for name, part in rows.splits.items()}
        )
        return {"macro_f1": 1 - 1 / len(rows.splits["train"]), "accuracy": 0.5 + 0.1 * len(runs)}

    monkeypatch.setattr(repeated_runs, "_metrics", metrics)
    return runs


def test_folds_have_all_rows_of_a_task_that_holds_out_few(trained: list[dict[str, set[str]]], tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model", template=CHATML)
    write_rows(tmp_path / "rows.jsonl")
    options = make_options(
        {
            "task": "text-generation",
            "model": str(tmp_path / "model"),
            "train": str(tmp_path / "rows.jsonl"),
            "held_out_rows": 2,
        }
    )
    cross_validate(options, 4, tmp_path / "out", lambda _: None)
    sizes = [len(run["test"]) for run in trained]
    assert max(sizes) - min(sizes) <= 3
    assert min(sizes) > 2


def test_a_label_that_a_fold_cannot_learn_is_named_before_training(
    options: FinetuneOptions, trained: list[dict[str, set[str]]], tmp_path: Path
) -> None:
    with (tmp_path / "rows.csv").open("a") as file:
        file.write("w150 w151 w152,rare\n")
    with pytest.raises(DataError, match="rare"):
        cross_validate(options, 5, tmp_path / "out", lambda _: None)
    assert trained == []


def test_each_row_is_tested_on_in_one_fold_and_trained_on_in_the_others(
    options: FinetuneOptions, trained: list[dict[str, set[str]]], tmp_path: Path
) -> None:
    found = cross_validate(options, 5, tmp_path / "out", lambda _: None)
    tested = [run["test"] for run in trained]
    assert len(set().union(*tested)) == sum(map(len, tested)) == 150
    assert all(29 <= len(test) <= 31 for test in tested)
    for run in trained:
        assert not run["train"] & run["test"]
        assert not run["validation"] & run["test"]
        assert len(run["train"]) + len(run["validation"]) + len(run["test"]) == 150
    assert found["mean"]["accuracy"] == pytest.approx(0.8)
    assert found["deviation"]["accuracy"] == pytest.approx(0.158114, abs=1e-6)
    again = cross_validate(options, 5, tmp_path / "out", lambda _: None)
    assert (again, len(trained)) == (found, 5), "what was measured is kept"


def test_a_curve_is_measured_on_the_same_rows_and_continued_by_a_power_law(
    options: FinetuneOptions, trained: list[dict[str, set[str]]], tmp_path: Path
) -> None:
    manifest = SimpleNamespace(metrics={"test": {"macro_f1": 1 - 1 / 120, "accuracy": 0.5}})
    found = learning_curve(options, Finetuned(tmp_path, manifest, reused=False), tmp_path / "out", lambda _: None)  # type: ignore[arg-type]
    counts = [point["rows"] for point in found["points"]]
    assert [len(run["train"]) for run in trained] == counts[:-1]
    assert counts[-1] == 120
    assert all(run["test"] == trained[0]["test"] for run in trained)
    assert found["metric"] == "macro_f1"
    assert found["expected"] == pytest.approx(1 - 1 / 240, abs=1e-3)
    assert "expected, from a power law" in (tmp_path / "out.curve.html").read_text()


def test_an_error_that_does_not_fall_gives_no_expectation(tmp_path: Path) -> None:
    points = [{"rows": count, "value": 0.9 - count / 1000, "interval": None} for count in (10, 20, 40)]
    assert expected(points, "macro_f1", 80) is None
    assert expected(points, "rmse", 80) == pytest.approx(0.84, abs=0.02)
    assert expected([{"rows": 10, "value": 40.0}, {"rows": 20, "value": 70.0}], "chrf", 40) == pytest.approx(85.0)
    write_learning_curve({"metric": "macro_f1", "points": points, "expected": None}, tmp_path / "page.html")
    assert "expected" not in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize(
    ("given", "folds", "curve", "says"),
    [
        ({}, 1, False, "--folds is 1"),
        ({"test": "x.csv"}, 5, False, "--folds splits the rows of --train"),
        ({"test_fraction": 0.0, "validation_fraction": 0.0}, 0, True, "--learning-curve needs held-out rows"),
    ],
)
def test_repeats_without_sense_are_refused(given: dict[str, Any], folds: int, curve: bool, says: str) -> None:
    with pytest.raises(UsageError) as refused:
        check_repeats(make_options({"model": "m", "train": "rows.csv", **given}), folds, curve)
    assert says in str(refused.value)
