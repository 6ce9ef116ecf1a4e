"""The recipe of a run, as it is printed."""

from __future__ import annotations

from deploykit.stages.finetune_options import make_options
from deploykit.training.recipe import ChosenValue, recipe_lines, recipe_of


def test_it_says_what_is_given_chosen_preset_or_a_default() -> None:
    given = make_options({"model": "m", "train": "x", "num_train_epochs": 2.0, "learning_rate": 1e-3})
    assert list(recipe_lines(recipe_of(given, {"warmup_ratio": ChosenValue(0.1, "it settles")})))[:4] == [
        "recipe:",
        "  learning rate  0.001    given",
        "  epochs         2        given",
        "  batch, rows    0        the default of --task classification",
    ]
    translator = {"task": "translation", "train": "x", "source_lang": "en", "target_lang": "fr"}
    found = recipe_of(make_options({**translator, "from_config": "marian-small", "max_steps": 9}), {})
    assert "num_train_epochs" not in found, "steps take the place of epochs"
    assert {name: choice.reason for name, choice in found.items()} == {
        "learning_rate": "of --from-config marian-small",
        "max_steps": "given",
        "batch_tokens": "of --from-config marian-small",
        "warmup_ratio": "the default of --task translation",
        "max_length": "the default of --task translation",
    }
