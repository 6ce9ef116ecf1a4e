"""The search space and the options of a search: what is read, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from deploykit.errors import UsageError
from deploykit.hyperparameters.options import SearchOptions
from deploykit.hyperparameters.space import Range, Values, default_space, read_space, starting_values
from deploykit.tasks.classification.options import ClassificationOptions
from deploykit.training.options import FinetuneOptions

OPTIONS = ClassificationOptions(model="m", train="rows.csv", learning_rate=1e-4)


def test_a_file_names_ranges_and_values(tmp_path: Path) -> None:
    path = tmp_path / "space.toml"
    path.write_text(
        'learning-rate = { low = 1e-5, high = 1e-3, log = true }\noptimizer = ["adamw", "sgd"]\n'
        "max_length = { low = 32, high = 128, step = 32 }\nnum_train_epochs = { low = 1, high = 4, step = 1 }\n"
        f'model = ["{tmp_path}", "org/small"]\n'
    )
    assert read_space(path, OPTIONS) == {
        "learning_rate": Range(1e-5, 1e-3, log=True),
        "optimizer": Values(("adamw", "sgd")),
        "max_length": Range(32, 128, step=32, integer=True),
        "num_train_epochs": Range(1.0, 4.0, step=1),
        "model": Values((str(tmp_path), "org/small")),
    }


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ({"lerning_rate": [1e-5]}, "lerning_rate is not an option of --task classification"),
        ({"test": ["a.csv"]}, "test selects rows"),
        ({"text_column": ["a"]}, "text_column selects rows"),
        ({"learning_rate": 1e-5}, "learning_rate is 1e-05"),
        ({"learning_rate": []}, "learning_rate is []"),
        ({"learning_rate": {"low": 1e-5}}, "needs two numbers"),
        ({"learning_rate": {"low": 1e-3, "high": 1e-5}}, "low below high"),
        ({"learning_rate": {"low": 0, "high": 1, "log": True}}, "low above 0"),
        ({"learning_rate": {"low": 1e-5, "high": 1, "lgo": True}}, "unknown key 'lgo'"),
        ({"weight_decay": {"low": 0, "high": 2}}, "weight_decay has 2.0: --weight-decay is 2.0"),
        ({"max_length": {"low": 32, "high": 64.5}}, "whole number"),
        ({"optimizer": {"low": 1, "high": 2}}, "write a list of values"),
        ({"optimizer": ["adamw", 3]}, "optimizer has 3, and --optimizer is of type str"),
        ({"qat": [1]}, "qat has 1, and --qat is of type bool"),
        ({}, "names no option"),
    ],
)
def test_an_entry_without_sense_is_refused(entry: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError) as refused:
        read_space(entry, OPTIONS)
    assert says in str(refused.value)
    assert refused.value.remedy


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"none\.toml: cannot be read"):
        read_space(tmp_path / "none.toml", OPTIONS)
    (tmp_path / "bad.toml").write_text("learning_rate = ")
    with pytest.raises(UsageError, match=r"bad\.toml: is not TOML"):
        read_space(tmp_path / "bad.toml", OPTIONS)


def test_the_default_space_has_the_given_options_in_it() -> None:
    space = default_space(OPTIONS)
    assert starting_values(space, OPTIONS) == {name: getattr(OPTIONS, name) for name in space}
    assert {"learning_rate", "num_train_epochs", "per_device_train_batch_size"} <= set(space)
    for entry in space.values():
        assert all(entry.contains(bound) for bound in entry.bounds)
    assert "num_train_epochs" not in default_space(ClassificationOptions(model="m", train="x", max_steps=5))


def test_the_first_run_of_the_default_space_has_all_given_options() -> None:
    options = ClassificationOptions(model="m", train="x", warmup_ratio=0.3, weight_decay=0.2, num_train_epochs=0.5)
    space = default_space(options)
    assert starting_values(space, options) == {name: getattr(options, name) for name in space}


def test_a_starting_value_outside_of_the_space_is_left_to_the_search() -> None:
    assert starting_values({"learning_rate": Range(1.0, 2.0), "seed": Values((0, 1))}, OPTIONS) == {"seed": 0}


@pytest.mark.parametrize(
    ("search", "options", "says"),
    [
        (SearchOptions(search_time="3m"), OPTIONS, "--search-time is for a search"),
        (SearchOptions(search=-1), OPTIONS, "--search is -1"),
        (SearchOptions(search=3, search_time="3"), OPTIONS, "--search-time '3' is not a time"),
        (SearchOptions(search=3, search_max_size="3"), OPTIONS, "--search-max-size '3' is not a size"),
        (SearchOptions(search=3, search_max_p50="fast"), OPTIONS, "--search-max-p50: 'fast' is not a time"),
        (SearchOptions(search=3, search_pruner="best"), OPTIONS, "--search-pruner is 'best'"),
        (
            SearchOptions(search=3),
            ClassificationOptions(model="m", train="x", validation_fraction=0),
            "needs validation",
        ),
    ],
)
def test_options_of_a_search_without_sense_are_refused(
    search: SearchOptions, options: FinetuneOptions, says: str
) -> None:
    with pytest.raises(UsageError) as refused:
        search.check(options)
    assert says in str(refused.value)
