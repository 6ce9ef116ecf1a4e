from __future__ import annotations

import json

import numpy as np
import pytest

from deploykit.errors import ArtifactError
from deploykit.tasks.classification.facts import Classification
from deploykit.tasks.registry import task_from_json, task_to_json


def test_a_task_survives_json() -> None:
    task = Classification(("no", "ja|nein", "是"), 128, 1, multi_label=False, text_columns=("a", "b"))
    assert task_from_json(json.loads(json.dumps(task_to_json(task)))) == task


@pytest.mark.parametrize("record", [{}, {"name": "poetry"}, {"name": "classification", "labels": ["a"], "colour": 1}])
def test_an_unknown_task_is_refused(record: dict[str, object]) -> None:
    with pytest.raises(ArtifactError, match="cannot read"):
        task_from_json(record)


def test_scores_are_probabilities_without_overflow() -> None:
    logits = np.array([[1000.0, -1000.0], [0.0, 0.0]], np.float32)
    assert Classification(("a", "b"), 8, 0).scores(logits).tolist() == [[1.0, 0.0], [0.5, 0.5]]
    with np.errstate(over="ignore"):
        assert Classification(("a", "b"), 8, 0, multi_label=True).scores(logits).tolist() == [[1.0, 0.0], [0.5, 0.5]]


def test_multi_label_answers_name_every_label_over_the_threshold() -> None:
    task = Classification(("x", "y", "z"), 8, 0, multi_label=True)
    assert task.decide(np.array([[0.9, 0.1, 0.5], [0.1, 0.2, 0.3]], np.float32)) == ["x|z", ""]
    assert task.targets(["z|x", ""]).tolist() == [[True, False, True], [False, False, False]]
