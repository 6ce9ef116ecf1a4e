"""What INT8 loses against fp32 in answers, measured without right answers."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_answerer import WORDS, write_checkpoint

from deploykit.errors import DataError
from deploykit.runtime.finite import NoNumberError
from deploykit.tasks.question_answering.checkpoint import TorchAnswerer
from deploykit.tasks.question_answering.export import _Grader
from deploykit.tasks.question_answering.facts import QuestionAnswering
from deploykit.tasks.question_answering.label_free import lost_points, preferences
from deploykit.tasks.question_answering.rows import Example, RightAnswers
from deploykit.tasks.question_answering.spans import Found, Span

TASK = QuestionAnswering(max_length=48, doc_stride=12, pad_token_id=0)
WITH_NONE = dataclasses.replace(TASK, no_answer_threshold=0.0)


def found(*spans: tuple[str, float], none: float = 0.0, none_score: float = 0.0) -> Found:
    return Found(tuple(Span(text, 0, len(text), score) for text, score in spans), none, none_score)


def test_a_changed_span_costs_the_margin_times_what_it_lacks_of_f1() -> None:
    right = found(("Rome", 0.6), ("the old town", 0.3), ("Rome in Italy", 0.1))
    assert lost_points(TASK, [right], [right]) == 0
    assert lost_points(TASK, [right], [found(("rome", 0.2))]) == 0
    assert lost_points(TASK, [right, right], [found(("the old town", 0.9)), right]) == pytest.approx(15)
    assert lost_points(TASK, [right], [found(("elsewhere", 0.9))]) == pytest.approx(60)
    assert lost_points(TASK, [right], [found(("Rome in Italy", 0.9))]) == pytest.approx(100 * 0.5 * 0.5)
    near = found(("Rome", 0.41), ("Paris", 0.4))
    assert lost_points(TASK, [near], [found(("Paris", 0.41), ("Rome", 0.4))]) == pytest.approx(1)


def test_no_answer_is_weighed_from_the_threshold() -> None:
    sure = found(("Rome", 0.3), none=float(np.log(0.6 / 0.3)), none_score=0.6)
    span = found(("Rome", 0.6), none=float(np.log(0.3 / 0.6)), none_score=0.3)
    assert lost_points(WITH_NONE, [sure], [sure]) == 0
    assert lost_points(WITH_NONE, [sure], [span]) == pytest.approx(30)
    assert lost_points(WITH_NONE, [span], [sure]) == pytest.approx(30)
    # At this threshold no answer is hardly preferred, or hardly not.
    tie = dataclasses.replace(WITH_NONE, no_answer_threshold=sure.none - 0.01)
    assert lost_points(tie, [sure], [span]) < 1
    assert preferences(sure, sure.none - 0.01)[""] > preferences(sure, sure.none - 0.01)["rome"]
    assert preferences(sure, 1e9)[""] < 1e-9


def test_a_form_without_numbers_or_spans_loses_what_fp32_was_sure_of() -> None:
    right = found(("Rome", 0.6), ("Paris", 0.3))
    assert lost_points(TASK, [right], [NoNumberError()]) == pytest.approx(60)
    assert lost_points(TASK, [right], [found()]) == pytest.approx(60)
    nothing = found(none_score=1.0)
    assert lost_points(TASK, [nothing, nothing], [nothing, NoNumberError()]) == pytest.approx(50)
    refused = DataError("too long", "shorten it")
    assert lost_points(TASK, [refused, right], [refused, right]) == 0


class Form:
    """A form of ``reference`` whose logits have noise."""

    token_budget, computes_padding = 4096, True

    def __init__(self, reference: TorchAnswerer, noise: float) -> None:
        self.reference, self.noise, self.random = reference, noise, np.random.default_rng(0)

    def run(self, inputs: dict[str, Any]) -> list[Any]:
        return [each + self.random.normal(0, self.noise, each.shape) for each in self.reference.run(inputs)]


def test_near_ties_of_few_questions_are_no_loss_and_a_bad_form_is_one(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "model", sharp=True)
    reference = TorchAnswerer.load(checkpoint)
    random = np.random.default_rng(1)
    contexts = [" ".join(random.choice(WORDS, 20)) for _ in range(60)]
    pairs = [(f"which {WORDS[i]} ?", text) for i, text in enumerate(contexts)]
    answers = [one.decide(None).text for one in reference.find(pairs)]
    rows = [
        Example(*pair, RightAnswers((text,), (0,)), "", f"{i}") for i, (pair, text) in enumerate(zip(pairs, answers))
    ]
    grader = _Grader(checkpoint, reference.task, rows[:20], lambda: rows)
    grader.grade_checkpoint(reference)

    def losses(noise: float) -> tuple[float, float]:
        engine: Any = Form(reference, noise)
        line = grader.enter("int8", "onnxruntime", grader.outputs(engine), 1, lambda: 0.0)
        return grader.drop(line), grader.lost_without_labels(Form(reference, noise))  # type: ignore[arg-type]

    assert losses(0) == (0, 0)
    dropped, lost = losses(0.2)
    assert (dropped > 3, lost < 1.5) == (True, True), (dropped, lost)
    assert losses(2.0)[1] > 5
