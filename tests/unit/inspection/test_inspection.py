"""Slices, calibration and worst rows behind the metrics of any task, on rows whose truth is known."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from deploykit.bootstrap import Measure
from deploykit.data.reading import AS_FOUND
from deploykit.data.texts import TextRow
from deploykit.errors import DataError
from deploykit.inspection.drift import drift
from deploykit.inspection.page import write_text_report
from deploykit.inspection.reliability import calibration
from deploykit.inspection.rows import new_texts, read_columns, seen_keys
from deploykit.inspection.slices import common_slices, sliced
from deploykit.inspection.worst_rows import MOST, worst_rows

ROWS = 120
TEXTS = [f"text number {i}" + " more" * (i % 3) for i in range(ROWS)]
WRONG = np.arange(ROWS) < 30


def _measure_of(inside: NDArray[np.bool_]) -> Measure:
    right, loss = (~WRONG)[inside].astype(float), (1.0 + WRONG)[inside]
    return lambda w: {"exact_match": w @ right / w.sum(-1), "loss": w @ loss / w.sum(-1)}


def test_slices_come_worst_first_also_by_a_metric_that_is_an_error() -> None:
    columns = {"kind": ["bad" if i < 24 else "good" for i in range(ROWS)]}
    seen = frozenset(TEXTS[60:90])
    for names in (("exact_match", "loss"), ("loss",)):
        found = sliced(_measure_of, ROWS, common_slices(TEXTS, columns, seen), names)
        by_name = {one["slice"]: one for one in found}
        assert found[0] == {**found[0], "slice": "kind: bad", "rows": 24, "loss": 2.0, "worse": True}
        assert {"kind: good", "seen in training: yes", "seen in training: no"} <= set(by_name)
        assert by_name["seen in training: yes"]["rows"] == 30
        assert not by_name["seen in training: yes"]["worse"]
        assert by_name["kind: good"]["intervals"]["loss"][0] < by_name["kind: good"]["loss"] == 1 + 6 / 96
        assert not any(name.startswith("duplicates") for name in by_name)


def test_the_calibration_error_has_an_interval() -> None:
    random = np.random.default_rng(0)
    confidence = random.uniform(size=3000)
    honest = calibration(confidence, (random.uniform(size=3000) < confidence).astype(float))
    sure = calibration(confidence, (random.uniform(size=3000) < confidence**2).astype(float))
    assert honest["error"] < 0.04
    assert sure["error"] == pytest.approx(1 / 6, abs=0.03)
    for one in (honest, sure):
        assert one["interval"][0] <= one["error"] <= one["interval"][1]
    assert sum(line["rows"] for line in honest["reliability"]) == 3000


def test_worst_rows_are_wrong_ones_the_surest_first() -> None:
    f1, score = np.array([0.0, 1.0, 0.5, 0.0]), np.array([0.2, 0.9, 0.9, 0.8])
    names = [f"r{i}" for i in range(4)]
    found = worst_rows(names, ["x" * 400] * 4, names, names, {"f1": f1, "score": score})
    assert [one["origin"] for one in found] == ["r3", "r0", "r2"]
    assert found[0] == {**found[0], "f1": 0.0, "score": 0.8, "expected": "r3"}
    assert len(found[0]["asked"]) == 301
    many = np.zeros(90)
    assert len(worst_rows(["r"] * 90, ["a"] * 90, ["b"] * 90, ["c"] * 90, {"chrf": many, "score": many})) == MOST


def test_columns_to_slice_by_are_those_of_a_table(tmp_path: Path) -> None:
    rows = tmp_path / "rows.csv"
    rows.write_text("text,source\na,mail\nb,\n")
    origins = ["rows.csv:3", "rows.csv:2"]
    assert read_columns(str(rows), ["source"], reading=AS_FOUND, split="test")(origins) == {"source": ["", "mail"]}
    assert read_columns("nowhere", [], reading=AS_FOUND, split="test")(origins) == {}
    with pytest.raises(DataError, match="has no column 'sauce' to slice by"):
        read_columns(str(rows), ["sauce"], reading=AS_FOUND, split="test")(origins)
    with pytest.raises(DataError, match=r"x\.json:1: is not a row of a table"):
        read_columns(str(rows), ["source"], reading=AS_FOUND, split="test")(["x.json:1"])


def test_texts_are_read_as_inputs_or_from_rows_with_answers() -> None:
    def task(*inputs: str | None) -> Any:
        return SimpleNamespace(
            input_columns=("text_column",),
            read_inputs=lambda source, facts, reading, columns: [TextRow("r", text, None) for text in inputs],
            read_texts=lambda source, facts, reading, columns: [(f"of rows {columns}", "answer")],
        )

    given: dict[str, Any] = {"text_column": "t", "label_column": "l"}
    assert new_texts(task("a", None, "b"), None, "x", reading=AS_FOUND, columns=given) == ["a", "b"]  # type: ignore[arg-type]
    assert new_texts(task("a", "b", "c"), None, "x", reading=AS_FOUND, columns=given, most=2) == ["a", "c"]  # type: ignore[arg-type]
    assert new_texts(task(None), None, "x", reading=AS_FOUND, columns=given) == ["of rows {'text_column': 't'}"]  # type: ignore[arg-type]
    assert seen_keys(task("A  b", "a b"), None, "x", reading=AS_FOUND, columns={}) == {"a b"}  # type: ignore[arg-type]


def test_a_page_shows_what_there_is(tmp_path: Path) -> None:
    columns = {"kind": ["<bad>" if i < 24 else "good" for i in range(ROWS)]}
    score = np.linspace(0, 1, ROWS)
    record: dict[str, Any] = {
        "rows": ROWS,
        "metrics": {"exact_match": 0.75, "part": {"f1": 0.5}, "intervals": {"exact_match": [0.7, 0.8], "part.f1": [0.4, 0.6]}},
        "slices": sliced(_measure_of, ROWS, common_slices(TEXTS, columns, None), ("exact_match",)),
        "worst": worst_rows(TEXTS, TEXTS, TEXTS, ["<b>"] * ROWS, {"exact_match": 1.0 - WRONG, "score": score}),
        "calibration": calibration(score, 1.0 - WRONG),
        "drift": drift(TEXTS, [f"new {text}" for text in TEXTS], {"score": (score, score)}),
    }  # fmt: skip
    out = tmp_path / "page.html"
    write_text_report("m on rows", record, out, correct="exact match", confidence="the score")
    page = out.read_text()
    assert page.count("<svg") == 2
    for part in (
        "F1, part",
        "[0.4000, 0.6000]",
        "Worst rows",
        "&lt;b&gt;",
        "the score",
        "worse than all rows",
        "Drift",
    ):
        assert part in page, part
    assert "<bad>" not in page
    write_text_report("m", {**record, "slices": [], "worst": [], "calibration": record["calibration"]}, out)
    assert "Worst rows" not in out.read_text()
