"""Exact match and F1 as in the scripts of SQuAD and CMRC, thresholds, and intervals."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from deploykit.bootstrap import intervals
from deploykit.tasks.question_answering.facts import QuestionAnswering
from deploykit.tasks.question_answering.metrics import (
    answer_metrics,
    best_threshold,
    exact_match,
    exact_match_by_characters,
    f1,
    f1_by_characters,
    is_chinese,
    mean_scores,
    normalized,
)
from deploykit.tasks.question_answering.metrics_text import metrics_text
from deploykit.tasks.question_answering.rows import Example, RightAnswers
from deploykit.tasks.question_answering.spans import Found, Span

TASK = QuestionAnswering(64, 8, 0)


def test_answers_are_normalized_as_squads_script_does() -> None:
    assert normalized("  The Cat's  (a) hat, an  END. ") == "cats hat end"
    assert exact_match("the Eiffel Tower!", "Eiffel tower") == 1
    assert f1("in the old town hall", "old town") == pytest.approx(2 * 2 / (4 + 2))
    assert f1("a b c c", "c c d") == pytest.approx(2 * 2 / (3 + 3)), (
        "words count as often as both have them; a is an article"
    )
    assert f1("x", "y") == 0
    assert (f1("", ""), f1("", "x"), f1("the", "x")) == (1, 0, 0)


def test_chinese_is_measured_by_characters_and_the_longest_common_run() -> None:
    assert exact_match_by_characters("《北京》。", "北京") == 1
    assert f1_by_characters("在北京市", "北京") == pytest.approx(2 * 2 / (4 + 2))
    assert f1_by_characters("北东京", "北京") == pytest.approx(2 * 1 / (3 + 2)), "a run, not a subsequence"
    assert f1_by_characters("NBA 球星", "nba球") == pytest.approx(2 * 2 / (3 + 2))
    assert f1_by_characters("", "北") == 0
    assert is_chinese(["北京", "1998 年", "NBA"])
    assert not is_chinese(["Beijing", "北京"])
    found, truth = [_found("在北京市", 0), _found("Rome", 0)], [_example("北京"), _example("罗马")]
    assert answer_metrics(TASK, found, truth)["f1"] == pytest.approx(2 * 2 / (4 + 2) / 2), "whatever it was trained on"


def _found(text: str, none: float) -> Found:
    return Found((Span(text, 0, len(text), 0.9),), none, 0.05)


def _example(*answers: str) -> Example:
    return Example("q", "c", RightAnswers(answers, (0,) * len(answers)), "", "")


def test_metrics_take_the_best_of_several_right_answers() -> None:
    metrics = answer_metrics(
        TASK, [_found("big red dog", 0), _found("x", 0)], [_example("dog", "red dog"), _example("x")]
    )
    assert metrics["f1"] == pytest.approx((2 * 2 / (3 + 2) + 1) / 2)
    assert metrics["exact_match"] == 0.5
    assert metrics["rows"] == 2
    assert "no_answer" not in metrics
    low, high = metrics["intervals"]["f1"]
    assert low <= metrics["f1"] <= high
    assert "95 % intervals" in metrics_text(metrics)


def test_questions_with_and_without_an_answer_are_measured_separately() -> None:
    found = [_found("a1", -3.0), _found("b1", 2.0), _found("c1", 1.0), _found("d1", -1.0)]
    examples = [_example("a1"), _example("b1"), _example(), _example()]
    never = answer_metrics(TASK, found, examples)
    assert never["has_answer"] == {"exact_match": 1.0, "f1": 1.0, "rows": 2}
    assert never["no_answer"] == {"exact_match": 0.0, "f1": 0.0, "rows": 2}
    assert never["f1"] == 0.5
    assert never["intervals"]["has_answer.f1"] == [1.0, 1.0]
    assert never["intervals"]["no_answer.exact_match"] == [0.0, 0.0]
    assert "has answer" in metrics_text(never)
    assert "1.0000 [1.0000, 1.0000]" in metrics_text(never)
    assert never["best_f1"] == 0.75
    assert never["best_f1_threshold"] == -3.0
    decided = answer_metrics(dataclasses.replace(TASK, no_answer_threshold=-3.0), found, examples)
    assert decided["f1"] == 0.75
    assert decided["has_answer"]["f1"] == 0.5
    assert decided["no_answer"]["f1"] == 1.0
    assert "no answer" in metrics_text(decided)


def test_the_best_threshold_is_the_best_of_all() -> None:
    random = np.random.default_rng(3)
    for _ in range(50):
        count = int(random.integers(1, 30))
        none, score = random.normal(size=count).round(int(random.integers(0, 4))), random.random(count)
        answerable = random.random(count) < 0.6
        score[~answerable] = 0

        def mean(
            threshold: float, none: np.ndarray = none, score: np.ndarray = score, answerable: np.ndarray = answerable
        ) -> float:
            answered = none <= threshold
            return float(np.where(answered, np.where(answerable, score, 0), ~answerable).mean())

        best, threshold = best_threshold(none, score, answerable)
        assert best == pytest.approx(mean(threshold))
        assert best == pytest.approx(max(mean(t) for t in [*none, none.min() - 1]))


def test_a_refused_question_without_an_answer_is_right_at_every_threshold() -> None:
    metrics = answer_metrics(TASK, [_found("a1", 1.0), Found((), 0.0, 0.0)], [_example("a1"), _example()])
    assert (metrics["best_f1"], metrics["best_f1_threshold"], metrics["f1"]) == (1.0, 1.0, 1.0)


def test_the_interval_is_that_of_the_mean() -> None:
    values = np.r_[np.ones(80), np.zeros(20)]
    found = intervals(mean_scores(values, np.ones(100)), 100)
    low, high = found["exact_match"]
    error = 1.96 * np.sqrt(0.8 * 0.2 / 100)
    assert low == pytest.approx(0.8 - error, abs=0.02)
    assert high == pytest.approx(0.8 + error, abs=0.02)
    assert found["f1"] == [1.0, 1.0]
