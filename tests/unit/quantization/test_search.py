"""The search leaves the fewest parts in fp32, most sensitive first, and is resumed after a kill."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from deploykit.errors import ExportError
from deploykit.measurement_log import MeasurementLog
from deploykit.quantization.grading import Grader, Line
from deploykit.quantization.search import Search, fewest, hold_limit
from deploykit.report.pages import write_search

PARTS = [f"part{i}" for i in range(24)]


@pytest.mark.parametrize("needed", [1, 2, 3, 5, 8, 11, 12])
def test_the_fewest_parts_within_the_limit_are_found(needed: int) -> None:
    tried: list[int] = []

    def drop(kept: Sequence[str]) -> float:
        tried.append(len(kept))
        return 0.0 if len(kept) >= needed else 9.0

    assert list(fewest(PARTS, drop, 0.5)) == PARTS[:needed]
    assert len(tried) == len(set(tried)) <= 8


def test_exceeding_the_limit_with_half_of_the_model_in_fp32_is_an_error() -> None:
    with pytest.raises(ExportError, match=r"even with 12 of 24 parts in fp32 it loses 2\.00"):
        fewest(PARTS, lambda kept: 2.0, 0.5)


class Answers(Grader[float]):
    """A grader whose raw output is the macro-F1 itself."""

    figures = ("macro_f1",)

    def measure(self, raw: float) -> dict[str, Any]:
        return {"macro_f1": raw, "rows": 8}

    def answers(self, raw: float) -> list[str]:
        return ["same", f"{raw:.2f}"]


class Model:
    """A model that loses a point for each ``bad`` part in INT8, whose outputs change by its index in the list."""

    def __init__(
        self, bad: Sequence[str], trace: MeasurementLog, *, dies_at: int = 1000, precision: str = "int8"
    ) -> None:
        self.bad, self.trace, self.dies_at, self.precision = list(bad), trace, dies_at, precision
        self.grader = Answers()
        self.grader.enter("fp32", "pytorch", 0.9)
        self.said: list[str] = []
        self.written: list[tuple[str, ...]] = []
        self.sampled: list[tuple[str, ...]] = []

    def write(self, kept: Sequence[str]) -> Line:
        self.written.append(tuple(kept))
        return self.grader.enter(self.precision, "engine", 0.9 - 0.01 * sum(part not in kept for part in self.bad), 4)

    def sample(self, parts: Collection[str]) -> NDArray[np.float32]:
        if len(self.sampled) + len(self.written) >= self.dies_at:
            raise KeyboardInterrupt
        self.sampled.append(tuple(parts))
        return np.full(3, sum(1.0 + self.bad.index(part) for part in parts if part in self.bad), np.float32)

    def search(self, limit: float = 0.5, **options: Any) -> Search | None:
        return hold_limit(
            "INT8", PARTS, self.write, self.sample, self.grader, limit, self.trace, self.said.append, **options
        )


def trace_at(path: Path, key: str = "k") -> MeasurementLog:
    return MeasurementLog(path, key, say=lambda line: None)


def test_the_parts_that_change_the_outputs_most_alone_stay_in_fp32(tmp_path: Path) -> None:
    model = Model(["part7", "part3", "part19"], trace_at(tmp_path / "t.json"))
    found = model.search(limit=1.5)
    assert found is not None
    assert found.order[:4] == ("part19", "part3", "part7", "part0"), "equal ones as the model has them"
    assert found.sensitivity[:4] == (3.0, 2.0, 1.0, 0.0)
    assert found.kept == model.written[-1] == ("part19", "part3"), "what was written last is the result"
    assert model.grader.table[-1].figures["macro_f1"] == pytest.approx(0.89), "and it is what the table has"
    assert [(t.kept, round(t.drop, 6)) for t in found.trials] == [(0, 3.0), (1, 2.0), (2, 1.0)]
    assert "24 of 24: part23 alone in INT8 changes the outputs by 0" in model.said


def test_a_part_that_makes_the_outputs_nan_is_the_most_sensitive(tmp_path: Path) -> None:
    model = Model(["part7", "part3", "part19"], trace_at(tmp_path / "t.json"))
    sample = model.sample
    model.sample = lambda parts: np.float32(np.nan) * sample(parts) if "part3" in parts else sample(parts)  # type: ignore[method-assign]
    found = model.search(limit=1.5)
    assert found is not None
    assert found.order[:3] == ("part3", "part19", "part7")
    assert json.loads((tmp_path / "t.json").read_text(), parse_constant=pytest.fail), "JSON has no NaN"


def test_a_metric_that_is_no_number_loses_more_than_any_limit() -> None:
    grader = Answers()
    grader.enter("fp32", "pytorch", 0.9)
    line = grader.enter("int8", "engine", float("nan"))
    assert grader.drop(line) > 100
    with pytest.raises(ExportError, match="more than --max-drop 100"):
        grader.refuse_loss(line, "INT8", 100, "nothing", print)


def test_neighbours_are_sampled_together_if_there_are_many_parts(tmp_path: Path) -> None:
    model = Model(["part7", "part3", "part19"], trace_at(tmp_path / "t.json"))
    found = model.search(limit=1.5, most_samples=10)
    assert found is not None
    assert [len(parts) for parts in model.sampled] == [0, 2, 2, 3, 2, 3, 2, 2, 3, 2, 3]
    assert [part for parts in model.sampled for part in parts] == PARTS
    assert found.order[:3] == ("part19", "part20", "part2"), "groups by sensitivity, their parts as the model has them"
    assert found.kept == model.written[-1] == ("part19", "part20", "part2", "part3")
    assert "9 of 10: part19 to part20 alone in INT8 changes the outputs by 3" in model.said


def test_a_model_within_the_limit_is_not_searched(tmp_path: Path) -> None:
    model = Model(["part7"], trace_at(tmp_path / "t.json"))
    assert model.search(limit=1.5) is None
    assert (model.written, model.sampled) == ([()], [])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("enough", [True, False])
def test_better_rounding_is_tried_before_parts_are_left_in_fp32(tmp_path: Path, enough: bool) -> None:
    model = Model(["part7", "part3"], trace_at(tmp_path / "t.json"))

    def improve(loss: str) -> bool:
        assert loss == "INT8 loses 2.00 points of macro-F1"
        model.bad = [] if enough else ["part7"]
        return True

    found = model.search(limit=0.5, improve=improve)
    assert (found is None) == enough
    assert model.written[:2] == [(), ()]
    assert found is None or (found.kept, found.trials[0].drop) == (("part7",), pytest.approx(1.0))


def test_a_refusal_of_int4_names_its_option(tmp_path: Path) -> None:
    model = Model(PARTS, trace_at(tmp_path / "trace.json"), precision="int4")
    with pytest.raises(ExportError) as refusal:
        model.search(instead="INT8")
    assert "without --int4" in str(refusal.value.remedy)
    assert any("alone in INT4 changes the outputs" in line for line in model.said)
    assert any("parts in INT8 it loses" in line for line in model.said)


def test_a_refusal_shows_the_table_and_leaves_no_trace(tmp_path: Path) -> None:
    model = Model(PARTS, trace_at(tmp_path / "t.json"))
    with pytest.raises(ExportError, match=r"loses 24\.00 points of macro-F1, more than --max-drop 0\.5") as refused:
        model.search()
    assert "int8 engine 0.6600" in " ".join(refused.value.message.split())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dies_at", [2, 10, 26])
def test_a_killed_search_is_resumed(tmp_path: Path, dies_at: int) -> None:
    bad = ["part7", "part3", "part19"]
    path = tmp_path / "t.json"
    killed = Model(bad, trace_at(path), dies_at=dies_at)
    if dies_at < 26:
        with pytest.raises(KeyboardInterrupt):
            killed.search(limit=1.5)
    else:
        killed.search(limit=1.5)
    again = Model(bad, trace_at(path))
    found = again.search(limit=1.5)
    assert found == Model(bad, trace_at(tmp_path / "other.json")).search(limit=1.5)
    assert len([part for part in again.sampled if part]) == 24 - len([part for part in killed.sampled if part])
    assert again.written[-1] == ("part19", "part3"), "also where all trials were known"


def test_a_trace_of_other_inputs_is_not_used(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    assert trace_at(path, "a").measured("x", lambda: 1) == 1
    assert trace_at(path, "a").measured("x", lambda: 2) == 1
    assert trace_at(path, "b").measured("x", lambda: 3) == 3
    assert json.loads(path.read_text()) == {"key": "b", "measured": {"x": 3}}
    path.write_text("{")
    assert trace_at(path, "b").measured("x", lambda: 4) == 4


def test_measurements_that_are_not_reused_are_told_of(tmp_path: Path) -> None:
    path = tmp_path / "out.search.json"
    trace_at(path, "before").measured("a", lambda: 1)
    told: list[str] = []
    assert MeasurementLog(path, "now", told.append).measured("a", lambda: 2) == 2
    assert [line.partition(":")[2] for line in told] == [
        " 1 measurements are not reused: they are of other options or rows, or of other versions of the packages"
    ]
    told.clear()
    MeasurementLog(path, "now", told.append)
    assert told == [f"{path}: 1 measurements of an unfinished run are reused"]


def test_the_search_is_drawn_with_its_limits(tmp_path: Path) -> None:
    trial = {"drop": 3.0, "metrics": {"bleu": 30.5, "chrf": 50.0}}
    found = {"kept": ["a<b"], "order": ["a<b", "c"], "sensitivity": [0.5, 0.125],
             "trials": [{"kept": 0, **trial}, {"kept": 1, **trial, "drop": 0.25}]}  # fmt: skip
    limits = {"bleu": (33.5, 33.0), "chrf": (50.5, 50.0)}
    write_search({"onnxruntime": found, "tensorrt": found}, limits, tmp_path / "search.html")
    page = (tmp_path / "search.html").read_text()
    assert page.count("<svg") == 1
    for text in ("parts left in fp32", "BLEU", "chrF", "least allowed", "a&lt;b", "0.12", "Trials, tensorrt", "0.25"):
        assert text in page
    assert "a<b" not in page
    assert "http" not in page.replace("http://www.w3.org", "")
