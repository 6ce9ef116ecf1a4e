"""The options that a classifier's training chooses from its model and rows."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from transformers import AutoConfig

from deploykit.tasks.classification.recipe import Facts, choose, kind_of

MINILM = Facts("encoder", hidden=384, limit=512, rows=1600, lengths=[20] * 100)


def values(facts: Facts, **given: Any) -> dict[str, Any]:
    return {name: choice.value for name, choice in choose(facts, **given).items()}


def test_each_choice_has_its_reason() -> None:
    assert {name: (choice.value, choice.reason) for name, choice in choose(MINILM).items()} == {
        "learning_rate": (1e-4, "0.04 / hidden size 384 of an encoder"),
        "num_train_epochs": (3.0, "1,600 rows are 100 steps an epoch: at least 300 steps, 3 to 20 epochs"),
        "per_device_train_batch_size": (16, "1,600 rows, fewer than 4,000: more steps"),
        "warmup_ratio": (0.1, "the share of the steps in which the new head settles"),
        "max_length": (
            128,
            "99 % of the texts have at most 20 tokens; 128 at least: short texts are not padded to this length",
        ),
    }


@pytest.mark.parametrize(
    ("changes", "rate"),
    [
        ({"hidden": 768}, 5.2e-5),
        ({"hidden": 1024, "kind": "encoder-decoder"}, 3.9e-5),
        ({"hidden": 768, "kind": "decoder"}, 2.6e-5),
        ({"hidden": 8192, "kind": "decoder"}, 1e-5),
        ({"hidden": 32}, 5e-4),
        ({"adapter": True}, 1e-3),
        ({"rounded": True}, 5.2e-5),
    ],
)
def test_the_rate_falls_with_the_hidden_size(changes: dict[str, Any], rate: float) -> None:
    assert values(dataclasses.replace(MINILM, **changes))["learning_rate"] == rate


@pytest.mark.parametrize(
    ("rows", "given", "rate"),
    [
        (464, {}, 6.9e-5),  # 11 epochs
        (480, {}, 1e-4),  # 10 epochs
        (160, {"epochs": 3}, 1e-4),
        (1600, {"epochs": 11}, 6.9e-5),
        (1600, {"max_steps": 1001}, 6.9e-5),
        (160, {"epochs": 20, "max_steps": 50}, 1e-4),
    ],
)
def test_the_rate_is_lower_for_many_epochs(rows: int, given: dict[str, Any], rate: float) -> None:
    found = choose(dataclasses.replace(MINILM, rows=rows), **given)["learning_rate"]
    assert found.value == rate
    assert found.reason.endswith(", times 2/3 for more than 10 epochs") == (rate < 1e-4)


@pytest.mark.parametrize(
    ("rows", "epochs", "batch"), [(160, 20, 16), (800, 6, 16), (2000, 3, 16), (8000, 3, 32), (50_000, 2, 32)]
)
def test_few_rows_are_seen_often(rows: int, epochs: float, batch: int) -> None:
    found = values(dataclasses.replace(MINILM, rows=rows))
    assert (found["num_train_epochs"], found["per_device_train_batch_size"]) == (epochs, batch)


def test_epochs_follow_a_batch_that_is_given_and_processes_share_one_that_is_chosen() -> None:
    rows = dataclasses.replace(MINILM, rows=640)
    assert (found := values(rows, batch=64))["num_train_epochs"] == 20
    assert found["learning_rate"] == 6.9e-5
    assert values(rows, batch=8, accumulation=2) == {**values(rows), "num_train_epochs": 8}
    assert values(dataclasses.replace(rows, processes=4)) == {**values(rows), "per_device_train_batch_size": 4}


@pytest.mark.parametrize(
    ("lengths", "limit", "length"),
    [
        ([10] * 99 + [500], 512, 128),
        ([10] * 98 + [221, 500], 512, 224),
        ([2000] * 100, 8192, 512),
        ([300] * 100, 256, 256),
        ([10] * 100, 32, 32),
    ],
)
def test_the_length_covers_almost_all_texts_within_limits(lengths: list[int], limit: int, length: int) -> None:
    assert values(dataclasses.replace(MINILM, lengths=lengths, limit=limit))["max_length"] == length


def test_long_texts_are_batched_by_sixteen() -> None:
    facts = dataclasses.replace(MINILM, rows=8000, lengths=[400] * 10)
    assert values(facts)["per_device_train_batch_size"] == 16


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        ("bert", "encoder"),
        ("modernbert", "encoder"),
        ("gpt2", "decoder"),
        ("llama", "decoder"),
        ("t5", "encoder-decoder"),
    ],
)
def test_the_kind_of_a_model_is_that_of_its_type(family: str, kind: str) -> None:
    assert kind_of(AutoConfig.for_model(family)) == kind
