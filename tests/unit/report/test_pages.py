"""The report is complete, self-contained, and safe against any names."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from html_page import Page
from numpy.typing import NDArray

from deploykit.bench.run import Candidate, run_bench
from deploykit.bench.scenarios import ClosedLoop, Poisson
from deploykit.errors import ArtifactError
from deploykit.report.pages import write_report
from deploykit.tasks.classification.facts import Classification

NASTY = ("<script>alert(1)</script>", '$x_1$ & "q"', "_表情 😀", "\x00\x1b\nline", "half \ud800", "\uffff" * 50)


class Guess:
    def __init__(self, labels: Sequence[str], *, multi_label: bool = False, fail: bool = False) -> None:
        self.task = Classification(tuple(labels), max_length=8, pad_token_id=0, multi_label=multi_label)
        self._fail = fail

    def scores(self, texts: Sequence[str]) -> NDArray[np.float32]:
        if self._fail:
            raise RuntimeError("<b>broken</b>")
        return np.random.default_rng(len(texts)).random((len(texts), len(self.task.labels)), np.float32)

    def close(self) -> None:
        pass


def bench(labels: Sequence[str], *, multi_label: bool = False, graded: bool = True, fail: bool = False) -> Any:
    texts = [f"text {i}" for i in range(len(labels))]
    candidates = [
        Candidate(name, Guess(labels, multi_label=multi_label, fail=fail)) for name in ("<i>one</i>", "$two$")
    ]
    scenarios = (ClosedLoop(2), ClosedLoop(4), Poisson(100.0))
    truth = list(labels) if graded else None
    result = run_bench(candidates, texts, truth, scenarios, rounds=1, seconds=0.05, warmup_s=0)
    return json.loads(json.dumps(result.to_json(), allow_nan=False))


def report(result: Any, tmp_path: Path) -> tuple[str, Page]:
    out = tmp_path / "report.html"
    write_report(result, out)
    text = out.read_text(encoding="utf-8")
    return text, Page(text)


@pytest.fixture(scope="module")
def nasty() -> Any:
    return bench(NASTY)


def test_the_report_is_well_formed_and_needs_no_network(nasty: Any, tmp_path: Path) -> None:
    text, page = report(nasty, tmp_path)
    assert page.tags["svg"] == 5  # no memory was measured: two candidates share this process
    assert page.tags["script"] == page.tags["link"] == page.tags["img"] == 0
    assert page.references
    assert all(reference.startswith("#") for reference in page.references)
    assert "@import" not in text
    assert all(reference[1:] in page.ids for reference in page.references)


def test_ids_are_unique_across_figures(nasty: Any, tmp_path: Path) -> None:
    _, page = report(nasty, tmp_path)
    assert len(page.ids) > 10
    assert [name for name, count in page.ids.items() if count > 1] == []


def test_names_are_shown_not_interpreted(nasty: Any, tmp_path: Path) -> None:
    text, page = report(nasty, tmp_path)
    assert "<script" not in text
    assert page.tags["i"] == 0
    assert "<i>one</i>" in page.text
    assert "$two$" in page.text
    assert "<script>alert(1)" in page.text
    assert "_表情 😀" in page.text


def test_the_same_result_gives_the_same_bytes(nasty: Any, tmp_path: Path) -> None:
    first, _ = report(nasty, tmp_path)
    second, _ = report(nasty, tmp_path)
    assert first == second


def test_multi_label_has_a_matrix_a_label_up_to_twelve(tmp_path: Path) -> None:
    labels = [f"label{i}" for i in range(14)]
    _, page = report(bench(labels, multi_label=True), tmp_path)
    assert "label11" in page.text
    assert "label12" not in page.text
    assert "The first 12 of 14 labels." in page.text


def test_without_labels_there_are_no_accuracy_figures(tmp_path: Path) -> None:
    _, page = report(bench(["a", "b"], graded=False), tmp_path)
    assert page.tags["svg"] == 3
    assert "Confusion" not in page.text


def test_a_target_that_only_failed_still_gets_a_report(tmp_path: Path) -> None:
    _, page = report(bench(["a", "b"], graded=False, fail=True), tmp_path)
    assert page.tags["svg"] == 0
    assert page.tags["b"] == 0
    assert "<b>broken</b>" in page.text


def test_the_command_to_repeat_it_is_shown(nasty: Any, tmp_path: Path) -> None:
    _, page = report({**nasty, "command": "deploykit bench <model> && more"}, tmp_path)
    assert "deploykit bench <model> && more" in page.text


def test_another_json_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="not a bench result"):
        report({"accuracy": 1.0}, tmp_path)
    assert not (tmp_path / "report.html").exists()
