"""What INT8 loses against fp32, measured without labels, for each kind of classifier."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from deploykit.tasks.classification.export import _Grader
from deploykit.tasks.classification.facts import Classification
from deploykit.tasks.classification.label_free import lost_by_disagreement, lost_by_margin, lost_labels
from deploykit.tasks.classification.metrics import classification_metrics
from deploykit.tasks.classification.rows import Example


def test_a_changed_answer_costs_what_fp32_prefers_its_own_by() -> None:
    expected = np.array([[0.51, 0.49], [0.95, 0.05], [0.2, 0.8], [0.3, 0.7]], np.float32)
    assert lost_by_margin(expected, expected) == 0
    assert lost_by_margin(expected, np.array([[0.4, 0.6], *expected[1:]])) == pytest.approx(0.5)
    assert lost_by_margin(expected, np.array([expected[0], [0.4, 0.6], *expected[2:]])) == pytest.approx(22.5)
    assert lost_by_margin(expected, np.full((4, 2), np.nan, np.float32)) == pytest.approx(74)


def test_a_changed_label_costs_what_fp32_prefers_its_own_decision_by() -> None:
    expected = np.array([[0.51, 0.9, 0.1], [0.2, 0.95, 0.49]], np.float32)
    assert lost_labels(expected, expected, 0.5) == 0
    near = np.array([[0.49, 0.9, 0.1], [0.2, 0.95, 0.51]], np.float32)
    assert lost_labels(expected, near, 0.5) == pytest.approx(100 * (0.02 + 0.02) / 6)
    without = np.array([expected[0], [0.2, 0.1, 0.49]], np.float32)
    assert lost_labels(expected, without, 0.5) == pytest.approx(100 * 0.9 / 5, rel=1e-5)
    broken = np.array([expected[0], [np.nan] * 3], np.float32)
    assert lost_labels(expected, broken, 0.5) == pytest.approx(100 * (0.6 + 0.9 + 0.02) / 7, rel=1e-5)


def test_many_labels_that_no_row_has_do_not_hide_the_lost_ones() -> None:
    expected = np.full((50, 400), 0.001, np.float32)
    expected[:, 7] = 0.999
    lost = expected.copy()
    lost[:10, 7] = 0.001
    assert lost_labels(expected, lost, 0.5) == pytest.approx(100 * 10 * 0.998 / 90, rel=1e-4)


def test_a_margin_is_counted_from_the_threshold() -> None:
    expected = np.array([[0.31, 0.9]], np.float32)
    assert lost_labels(expected, np.array([[0.29, 0.9]], np.float32), 0.3) < 2
    assert lost_labels(np.array([[0.6, 0.9]], np.float32), np.array([[0.29, 0.9]], np.float32), 0.3) > 15


def test_noise_costs_as_much_correlation_as_the_numbers_lose() -> None:
    random = np.random.default_rng(0)
    truth = random.normal(3, 2, 20_000)
    exact = truth.astype(np.float32)
    noisy = (truth + random.normal(0, 0.2, len(truth))).astype(np.float32)
    assert lost_by_disagreement(exact, exact) == 0
    task = Classification(("score",), 8, 0, regression=True)
    pearson = classification_metrics(task, truth[:, None], noisy[:, None])["pearson"]
    assert lost_by_disagreement(exact, noisy) == pytest.approx(100 * (1 - pearson), rel=0.05)


def test_an_offset_or_another_scale_that_no_correlation_shows_costs_points() -> None:
    exact = np.linspace(-1, 1, 100).astype(np.float32)
    assert lost_by_disagreement(exact, exact + 0.3) > 5
    assert lost_by_disagreement(exact, 0.5 * exact) > 15
    assert np.isnan(lost_by_disagreement(exact, np.where(exact > 0.9, np.nan, exact)))
    assert lost_by_disagreement(np.ones(3, np.float32), np.ones(3, np.float32)) == 0


class Form:
    """A form of a model of one logit a text, which adds a constant to the length of the text."""

    def __init__(self, added: float) -> None:
        self.added, self.asked = added, 0

    def scores(self, texts: list[str]) -> np.ndarray:
        self.asked += len(texts)
        return np.array([[len(text) + self.added] for text in texts], np.float32)


def test_other_rows_are_read_only_if_the_metric_cannot_decide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [Example(text="a" * i, label=str(i + i % 3), origin=f"{i}") for i in range(1, 6)]
    read = []

    def at_hand() -> list[str]:
        read.append(1)
        return ["bb", "bbbb", "bbbbbb"]

    grader = _Grader(tmp_path, Classification(("score",), 8, 0, regression=True), rows, at_hand)
    reference = Form(0)
    grader.grade_checkpoint(reference)  # type: ignore[arg-type]
    monkeypatch.setattr(grader, "_scores", lambda engine, texts: engine.scores(texts))
    same = grader.enter("int8", "onnxruntime", Form(0).scores([row.asked for row in rows]), 1, lambda: 1 / 0)
    assert (grader.loss(same, 0.5).points, read, reference.asked) == (0, [], 5)
    for added, found in ((0, 0), (1, 100 * 1 / (2 * 8 / 3 + 1))):
        assert grader.lost_without_labels(Form(added)) == pytest.approx(found)  # type: ignore[arg-type]
    assert (read, reference.asked) == ([1], 8), "fp32 scores the rows once"
