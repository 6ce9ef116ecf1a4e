"""A study: shared by processes, continued after a kill, within limits."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import optuna
import pytest

from deploykit.errors import ArtifactError
from deploykit.hyperparameters.page import write_search_page
from deploykit.hyperparameters.space import Range, Space, Values
from deploykit.hyperparameters.study import SharedStudy

SPACE: Space = {"learning_rate": Range(1e-5, 1e-2, log=True), "optimizer": Values(("adamw", "sgd"))}
START = {"learning_rate": 1e-4, "optimizer": "adamw"}


def _open(folder: Path, key: str = "key", **given: Any) -> SharedStudy:
    return SharedStudy(
        folder, key, **{"space": SPACE, "start": START, "pruner": "median", "runs": 3, "seed": 0, **given}
    )


def test_a_run_that_was_interrupted_can_be_taken_again_by_the_same_process(tmp_path: Path) -> None:
    study = _open(tmp_path, runs=1)
    first = study.take()
    assert first is not None
    assert study.take() is None
    study.release(first)
    again = study.take()
    assert again is not None
    assert (again.number, again.continued, again.values) == (0, True, first.values)


def test_after_its_time_an_interrupted_run_is_continued_and_none_started(tmp_path: Path) -> None:
    study = _open(tmp_path)
    assert study.take(new=False) is None
    first = study.take()
    assert first is not None
    study.release(first)
    again = study.take(new=False)
    assert again is not None
    assert (again.number, again.continued) == (0, True)
    assert study.take(new=False) is None


def test_processes_share_the_runs_and_none_takes_anothers(tmp_path: Path) -> None:
    ours, theirs = _open(tmp_path), _open(tmp_path)
    first, second, third = ours.take(), theirs.take(), ours.take()
    assert first is not None
    assert second is not None
    assert third is not None
    assert first.values == START, "the first run has the options as they are given"
    assert [first.number, second.number, third.number] == [0, 1, 2]
    assert second.values != third.values
    assert theirs.take() is None
    assert theirs.running
    for run, value in ((first, 0.5), (second, 0.7), (third, 0.6)):
        (tmp_path / f"run-{run.number:04}").mkdir()
        (tmp_path / f".run-{run.number:04}.0.training").mkdir()
        ours.end(run, value, metric="accuracy")
    assert not theirs.running
    assert theirs.best is not None
    assert theirs.best.number == 1
    assert [path.name for path in tmp_path.glob("*run-*") if path.is_dir()] == [".run-0001.0.training", "run-0001"]
    assert _open(tmp_path, runs=4).take() is not None, "more runs go on with the same search"


def test_a_run_whose_process_died_is_continued(tmp_path: Path) -> None:
    killed = _open(tmp_path)
    run = killed.take()
    assert run is not None
    killed.report(run, 0.33, 0.4)
    os.close(run.lock)  # as the kernel does for a dead process
    again = _open(tmp_path).take()
    assert again is not None
    assert (again.number, again.values, again.continued) == (0, run.values, True)
    killed.report(again, 0.33, 0.4)  # evaluated a second time: no warning, which would be an error
    killed.report(again, 0.67, 0.5)
    killed.end(again, 0.5)
    fresh = _open(tmp_path).take()
    assert fresh is not None
    assert (fresh.number, fresh.continued) == (1, False)


def test_a_run_that_is_worse_than_the_others_is_pruned(tmp_path: Path) -> None:
    study = _open(tmp_path, runs=6)
    for _ in range(4):
        run = study.take()
        assert run is not None
        study.report(run, 0.5, 0.8)
        study.end(run, 0.8)
    bad, good = study.take(), study.take()
    assert bad is not None
    assert good is not None
    with pytest.raises(optuna.TrialPruned):
        study.report(bad, 0.5, 0.1)
    study.report(good, 0.5, 0.9)
    study.report(good, 1.0, 0.1)  # at the end nothing is saved by pruning


def test_a_run_outside_of_the_limits_is_not_the_best(tmp_path: Path) -> None:
    study = _open(tmp_path)
    for value, excess in ((0.9, 3.0), (0.5, -1.0), (0.4, -2.0)):
        run = study.take()
        assert run is not None
        run.trial.set_constraint("size_mb", excess)
        study.end(run, value)
    assert study.best is not None
    assert study.best.value == 0.5


def test_a_run_with_the_values_of_an_ended_one_has_its_result(tmp_path: Path) -> None:
    study = _open(tmp_path, space={"optimizer": Values(("adamw",))}, start={}, runs=4)
    first = study.take()
    assert first is not None
    assert first.same is None
    study.report(first, 0.5, 0.4)
    first.trial.set_constraint("size_mb", -1.0)
    (tmp_path / "run-0000").mkdir()
    study.end(first, 0.7, metric="accuracy", seconds=9.0, size_mb=3.0)
    for number in (1, 2, 3):
        again = study.take()
        assert again is not None
        assert again.same is not None
        assert again.same.number == 0
        study.repeat(again, again.same)
        run = study.runs[number]
        assert (run.value, run.intermediate_values, run.constraints) == (0.7, {5: 0.4}, {"size_mb": -1.0})
        assert run.user_attrs == {"metric": "accuracy", "seconds": 0.0, "size_mb": 3.0}
    assert study.take() is None
    assert study.best is not None
    assert study.best.number == 0, "the run that has the checkpoint"
    assert (tmp_path / "run-0000").is_dir()


def test_a_search_with_other_options_is_refused(tmp_path: Path) -> None:
    _open(tmp_path)
    with pytest.raises(ArtifactError, match="is a search with other options"):
        _open(tmp_path, "other")


def test_the_search_finds_the_optimum_and_names_the_option_that_matters(tmp_path: Path) -> None:
    space: Space = {"learning_rate": Range(1e-5, 1e-1, log=True), "weight_decay": Range(0.0, 0.1)}
    study = _open(tmp_path, runs=16, space=space, start={"learning_rate": 1e-5, "weight_decay": 0.0})
    while (run := study.take()) is not None:
        study.end(run, -abs(float(run.values["learning_rate"]) - 1e-2))
    assert study.best is not None
    assert study.best.value is not None
    assert abs(study.best.value) < 5e-3
    assert max(study.importance(), key=lambda name: study.importance()[name]) == "learning_rate"


def test_the_page_shows_every_run_and_what_mattered(tmp_path: Path) -> None:
    def run(number: int, value: float | None, state: str = "complete", **more: Any) -> dict[str, Any]:
        return {"run": number, "state": state, "value": value, "selections": {"3": 0.2}, "fits": True,
                "options": {"learning_rate": 1e-4 * (number + 1), "optimizer": "adamw"}, "seconds": 3.0,
                "size_mb": 20.0, "p50_ms": 2.0, "error": None, **more}  # fmt: skip

    record = {
        "task": "classification", "objective": "macro_f1", "lower_is_better": False, "pruner": "median", "best": 3,
        "asked": 9, "limits": {"size_mb": 30.0, "p50_ms": None}, "importance": {"learning_rate": 0.75, "optimizer": 0.25},
        "space": {"learning_rate": {"low": 1e-5, "high": 1e-2, "log": True, "step": None, "integer": False},
                  "optimizer": {"values": ("adamw", "sgd")}},
        "runs": [run(0, 0.5), run(1, None, "pruned"), run(2, None, "fail", error="no <memory>"), run(3, 0.75),
                 run(4, 0.9, fits=False, size_mb=40.0), run(5, 0.8, fits=False, size_mb=None, error="loses <2 points")],
    }  # fmt: skip
    write_search_page(record, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert page.count("<svg") == 3
    for words in (
        "run 3: 0.7500",
        "ended early",
        "failed: no &lt;memory&gt;",
        "at most 30 MB, in INT8",
        "best so far",
        "75 %",
        "6 of 9: --search-time ended the search",
        "2 of 4 finished runs",
        "ruled out: 40.0 MB, above the limit of 30",
        "ruled out: no INT8 export: loses &lt;2 points",
    ):
        assert words in page, words
    write_search_page({**record, "best": None, "objective": None, "importance": {}, "runs": [run(0, None, "running")]},
                      tmp_path / "page.html")  # fmt: skip
    assert "none is within the limits" in (tmp_path / "page.html").read_text()
