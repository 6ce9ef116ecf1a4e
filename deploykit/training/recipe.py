"""Describe the values that a run trains with, each with its reason, for printing before training."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from deploykit.training.options import FinetuneOptions

GIVEN = "given"
_SHOWN: Mapping[str, str] = {
    "learning_rate": "learning rate",
    "num_train_epochs": "epochs",
    "max_steps": "steps",
    "per_device_train_batch_size": "batch, rows",
    "batch_tokens": "batch, tokens",
    "warmup_ratio": "warm-up",
    "max_length": "length, tokens",
}
"""Option -> its name in the recipe, in the order of the lines."""


@dataclass(frozen=True)
class ChosenValue:
    """The ``value`` of an option, and the ``reason`` for it: ``GIVEN`` where the user chose it."""

    value: Any
    reason: str


Recipe = Mapping[str, ChosenValue]
"""Option -> its value and reason."""


def recipe_of(options: FinetuneOptions, chosen: Recipe) -> Recipe:
    """Return the recipe of a run: the values of its ``options``, and the reasons of those that are ``chosen`` for its rows."""
    preset = options.preset(getattr(options, "from_config", None))
    defaults = {field.name: field.default for field in dataclasses.fields(options)}
    found = {}
    for name in _SHOWN:
        value = getattr(options, name, None)
        # Steps replace epochs.
        if value is None or (name == "max_steps" and not value) or (name == "num_train_epochs" and options.max_steps):
            continue
        if name in chosen:
            found[name] = chosen[name]
        elif name in preset and preset[name] == value:
            found[name] = ChosenValue(value, f"of --from-config {options.origin}")
        elif value == defaults[name]:
            found[name] = ChosenValue(value, f"the default of --task {options.task}")
        else:
            found[name] = ChosenValue(value, GIVEN)
    return found


def recipe_lines(recipe: Recipe) -> Iterator[str]:
    """Yield a line for each value of a recipe."""
    yield "recipe:"
    for name, choice in recipe.items():
        yield f"  {_SHOWN[name]:<14} {choice.value:<7g}  {choice.reason}"
