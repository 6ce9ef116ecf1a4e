"""Bootstrap intervals, and two models compared on the same rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from deploykit import bootstrap
from deploykit.bootstrap import Measure, differences, intervals
from deploykit.tasks.classification.facts import Classification
from deploykit.tasks.classification.metrics import classification_metrics
from deploykit.tasks.classification.metrics_text import metrics_text
from deploykit.tasks.classification.model_card import results
from deploykit.tasks.classification.resampling import measure_of, metrics_with_intervals


def _mean(values: NDArray[Any]) -> Measure:
    return lambda weights: {"mean": weights @ values / weights.sum(axis=-1)}


def test_an_interval_is_that_of_the_normal_approximation(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(1).normal(size=2000)
    low, high = intervals(_mean(values), 2000)["mean"]
    half = 1.96 * values.std() / np.sqrt(2000)
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=half / 10)
    monkeypatch.setattr(bootstrap, "_AT_ONCE", 2000 * 300)  # in four parts
    assert intervals(_mean(values), 2000)["mean"] == pytest.approx([low, high], abs=half / 5)


def test_a_difference_of_two_models_is_found_where_their_intervals_overlap() -> None:
    """Both models fail on the same hard rows; paired, the small difference shows."""
    random = np.random.default_rng(0)
    hard = random.random(1000) < 0.4
    worse = ~hard & (random.random(1000) < 0.97)
    ours, theirs = _mean((~hard).astype(float)), _mean(worse.astype(float))
    assert intervals(ours, 1000)["mean"][0] < intervals(theirs, 1000)["mean"][1]
    found = differences(ours, theirs, 1000)["mean"]
    assert found["beyond_noise"]
    assert found["difference"] == pytest.approx(np.mean(~hard) - worse.mean(), abs=1e-6)
    assert found["interval"][0] < found["difference"] < found["interval"][1]
    assert not differences(ours, ours, 1000)["mean"]["beyond_noise"]


@pytest.mark.parametrize("kind", ["one label", "several labels", "numbers"])
def test_weights_of_one_give_the_metrics_and_a_weight_of_two_a_row_twice(kind: str) -> None:
    random = np.random.default_rng(3)
    task = Classification(("a", "b", "c"), 8, 0, multi_label=kind == "several labels", regression=kind == "numbers")
    scores = random.random((60, 3)).astype(np.float32)
    if kind == "numbers":
        truth: NDArray[Any] = random.random((60, 1)).astype(np.float32)
        scores = scores[:, :1]
    elif kind == "several labels":
        truth = random.random((60, 3)) < 0.4
    else:
        scores /= scores.sum(axis=1, keepdims=True)
        truth = np.eye(3, dtype=bool)[random.integers(0, 2, 60)]
    measure = measure_of(task, truth, scores)
    weights = np.stack([np.ones(60), np.where(np.arange(60) < 30, 2.0, 0.0)])
    twice = np.repeat(np.arange(30), 2)
    ranked = "spearman"  # of all rows' ranks
    for row, wanted in enumerate((classification_metrics(task, truth, scores),
                                  classification_metrics(task, truth[twice], scores[twice]))):  # fmt: skip
        for name, value in measure(weights).items():
            part: Any = wanted
            for key in name.split("."):
                part = part[key]
            if name != ranked or row == 0:
                assert value[row] == pytest.approx(part, abs=1e-6), name


def test_tables_and_cards_show_the_intervals() -> None:
    task = Classification(("a", "b"), 8, 0)
    truth = np.eye(2, dtype=bool)[[0, 1] * 20]
    scores = np.float32([[0.9, 0.1], [0.2, 0.8]] * 19 + [[0.1, 0.9], [0.9, 0.1]])
    metrics = metrics_with_intervals(task, truth, scores)
    low, high = metrics["intervals"]["macro_f1"]
    assert low < metrics["macro_f1"] < high <= 1
    assert f"[{low:.4f}, {high:.4f}]" in metrics_text(metrics)
    assert f"[{low:.3f}, {high:.3f}]" in results(metrics, 40)[4]
    plain = {name: value for name, value in metrics.items() if name != "intervals"}
    assert "[" not in metrics_text(plain) + "".join(results(plain, 40))
