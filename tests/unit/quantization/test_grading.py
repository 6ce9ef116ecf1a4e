"""Which measure decides whether a form loses too much: the metric, or where rows are too few, one that needs no labels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from deploykit.bootstrap import Measure
from deploykit.errors import ExportError
from deploykit.measurement_log import MeasurementLog
from deploykit.quantization.grading import Grader, Line
from deploykit.quantization.search import hold_limit
from deploykit.tasks.text_generation.grading import Scored, lost_by_divergence


class Right(Grader[NDArray[np.bool_]]):
    """A grader whose raw output says which rows have the right answer."""

    figures = ("macro_f1",)
    label_free = "changed answers"

    def measure(self, raw: NDArray[np.bool_]) -> dict[str, Any]:
        return {"macro_f1": float(raw.mean())}

    def measure_of(self, raw: NDArray[np.bool_]) -> Measure:
        return lambda weights: {"macro_f1": weights @ raw / weights.sum(axis=-1)}

    def answers(self, raw: NDArray[np.bool_]) -> Sequence[str]:
        return [str(row) for row in raw]


def form(rows: int, wrong: int, without_labels: Callable[[], float] | None) -> tuple[Right, Line]:
    """Return a form that has ``wrong`` more wrong answers than the checkpoint, which has none."""
    grader = Right()
    grader.enter("fp32", "pytorch", np.ones(rows, bool))
    return grader, grader.enter("int8", "engine", np.arange(rows) >= wrong, 4, without_labels)


def must_not_decide() -> float:
    raise AssertionError("the metric decides")


def test_one_more_wrong_answer_of_20_is_decided_without_labels() -> None:
    grader, line = form(20, 1, lambda: 0.1)
    loss = grader.loss(line, 0.5)
    assert grader.drop(line) == pytest.approx(5), "the metric alone says too much"
    assert (loss.points, loss.measure) == (0.1, "changed answers")
    assert "20 rows cannot resolve --max-drop 0.5: it loses 5.00 points of macro-F1" in loss.unresolved
    assert loss.unresolved.endswith("It is decided by changed answers: 0.10 points")


def test_a_bad_form_on_few_rows_is_caught_by_either_measure() -> None:
    grader, line = form(20, 10, lambda: 0.0)
    assert grader.loss(line, 0.5).points == pytest.approx(50), "beyond noise: the metric decides"
    grader, line = form(20, 1, lambda: 40.0)
    assert grader.loss(line, 0.5).points == 40
    grader, line = form(20, 1, lambda: float("nan"))
    assert grader.loss(line, 0.5).points > 100
    said: list[str] = []
    with pytest.raises(ExportError, match=r"points of changed answers, more than --max-drop 0\.5"):
        grader.refuse_loss(line, "INT8", 0.5, "nothing", said.append)
    assert said[0].startswith("INT8: 20 rows cannot resolve --max-drop 0.5")


def test_a_metric_that_rows_resolve_decides() -> None:
    grader, line = form(20, 0, must_not_decide)
    assert (grader.loss(line, 0.5).points, grader.loss(line, 0.5).unresolved) == (0, "")
    grader, line = form(20_000, 20, must_not_decide)
    assert grader.loss(line, 0.5).points == pytest.approx(0.1)
    grader, line = form(2000, 40, must_not_decide)
    assert grader.loss(line, 0.5).points == pytest.approx(2)


def test_without_another_measure_the_metric_counts_and_the_user_is_told() -> None:
    grader, line = form(20, 1, None)
    loss = grader.loss(line, 0.5)
    assert loss.points == pytest.approx(5)
    assert "The measured loss counts; more rows (--data) narrow the interval" in loss.unresolved


@pytest.mark.parametrize("points", [0.1, 9.0])
def test_noise_of_few_rows_keeps_no_part_in_fp32(tmp_path: Path, points: float) -> None:
    grader = Right()
    grader.enter("fp32", "pytorch", np.ones(20, bool))
    said: list[str] = []

    def write(
        kept: Sequence[str],
    ) -> Line:  # one near tie flips whatever is kept; the part "bad" is the only one that matters
        lost = points if "bad" not in kept else 0.1
        return grader.enter("int8", "engine", np.arange(20) >= 1, 4, lambda: lost)

    found = hold_limit(
        "INT8", ["a", "bad", "c", "d"], write, lambda parts: np.array([float("bad" in parts)]), grader, 0.5,
        MeasurementLog(tmp_path / "t.json", "k", print), said.append,
    )  # fmt: skip
    assert "decided by changed answers" in said[0]
    assert (found is None) == (points < 0.5)
    assert found is None or (found.kept, found.trials[-1].measure) == (("bad",), "changed answers")


def test_divergence_of_the_next_token_is_in_points_of_loss() -> None:
    none = np.zeros(0)
    rows = [Scored(none, none.astype(bool), none.astype(int), np.array(kl)) for kl in ([0.001, 0.003], [0.005])]  # type: ignore[arg-type]
    assert lost_by_divergence(rows) == pytest.approx(0.3)
