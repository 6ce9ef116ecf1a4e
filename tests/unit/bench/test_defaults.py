"""The means and the table of bench/defaults.py."""

from __future__ import annotations

from typing import Any

import numpy as np

from deploykit.runtime.tokenizer import Encoded
from deploykit.tasks.classification.facts import Classification
from deploykit.tasks.classification.fitting import EncodedTexts


def test_the_table_has_both_recipes_and_their_difference(bench: Any) -> None:
    def run(rate: float, f1: float) -> dict[str, Any]:
        values = {"learning_rate": rate, "num_train_epochs": 3.0, "per_device_train_batch_size": 16}
        return {
            "values": values,
            "macro_f1": f1,
            "interval": [f1 - 0.02, f1 + 0.02],
            "of_seeds": [f1 - 0.01, f1 + 0.01],
        }

    found = {
        "key": "tweets-200", "title": "sentiment", "rows": {"train": 2000, "validation": 20, "test": 100},
        "default": run(1e-4, 0.91), "search": {**run(3e-4, 0.9), "runs": 20, "ended_early": 7},
        "difference": {"difference": 0.01, "interval": [-0.005, 0.025]},
    }  # fmt: skip
    suite = {
        "started": "2026-01-02T00:00:00",
        "machine": {"cpu": "CPU", "cpus_usable": 2},
        "threads": 1,
        "workloads": [found],
    }
    assert (
        "| tweets-200: sentiment | 2,000, 20, 100 | rate 1.0e-04, 3 epochs, batch 16 | 91.0 [89.0, 93.0]: 90.0, 92.0 | "
        "20 (7) | rate 3.0e-04, 3 epochs, batch 16 | 90.0 [88.0, 92.0]: 89.0, 91.0 | +1.0 [-0.5, +2.5] |"
    ) in bench("table").render_defaults(suite)


def test_a_side_is_the_mean_of_its_seeds(bench: Any) -> None:
    task = Classification(("a", "b"), max_length=8, pad_token_id=0)
    truth = np.eye(2, dtype=bool)[[0, 1, 0, 1]]
    subject = object.__new__(bench("defaults").Subject)
    subject.task = task
    rows = EncodedTexts(Encoded([[0]] * len(truth), []), truth, task)
    subject.splits = {"validation": rows, "test": rows}
    right, wrong = truth.astype(float), 1.0 - truth
    runs = [
        {"validation": right, "test": scores, "seconds": seconds, "cpu_seconds": 1.0}
        for scores, seconds in ((right, 2.0), (wrong, 4.0))
    ]
    found = subject.measured(runs)
    assert (found["macro_f1"], found["of_seeds"], found["accuracy"], found["seconds_one"]) == (
        0.5,
        [1.0, 0.0],
        0.5,
        3.0,
    )
    assert subject.difference(runs[:1], runs)["difference"] == 0.5
