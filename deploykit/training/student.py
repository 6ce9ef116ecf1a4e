"""Make a smaller model from some of the layers of another."""

from __future__ import annotations

import copy
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from deploykit.errors import UsageError
from deploykit.training.last_end_token import read_last_end

Side = Literal["", "encoder", "decoder"]

_COUNTS: dict[Side, tuple[str, ...]] = {
    "": ("num_hidden_layers",),
    "encoder": ("encoder_layers", "num_layers", "num_hidden_layers"),
    "decoder": ("decoder_layers", "num_decoder_layers"),
}
"""Names of the number of layers in configurations; of a translator num_hidden_layers is that of the encoder."""


def keep_layers(model: Any, count: int, side: Side = "") -> tuple[Any, list[int]]:
    """Return a model with ``count`` layers of ``model``, or of its ``side``, evenly spaced from the first to the last, and
    their numbers.

    Raises UsageError if there are not more layers than that.
    """
    config = copy.deepcopy(model.config)
    layers = layer_count(model, side)
    part = {"": lambda: model, "encoder": model.get_encoder, "decoder": model.get_decoder}[side]()
    lists = [module for module in _outer_lists(part) if len(module) == layers]
    if len(lists) != 1 or count >= layers:
        raise UsageError(
            f"--student asks for {count} layers, and the {side or 'model'} has {layers or 'no known'}",
            "give a lower number, or leave it out",
        )
    kept = [round(i) for i in np.linspace(0, layers - 1, count)] if count > 1 else [0]
    for name in _COUNTS[side]:
        if hasattr(config, name):
            setattr(config, name, count)
    for name, value in vars(config).items() if not side else ():
        if isinstance(value, list) and len(value) == layers:  # the kind of each layer's attention, say
            setattr(config, name, [value[i] for i in kept])
    [prefix] = [name for name, module in model.named_modules() if module is lists[0]]
    numbers = {str(own): str(new) for new, own in enumerate(kept)}
    state = {}
    for key, tensor in model.state_dict().items():
        if key.startswith(f"{prefix}."):
            number, _, rest = key.removeprefix(f"{prefix}.").partition(".")
            if number not in numbers:
                continue
            key = f"{prefix}.{numbers[number]}.{rest}"
        state[key] = tensor
    with torch.random.fork_rng():
        student = read_last_end(type(model)(config))
    student.load_state_dict(state)
    if model.can_generate():
        student.generation_config = copy.deepcopy(model.generation_config)
    return student.train(model.training), kept


def layer_count(model: Any, side: Side = "") -> int:
    """Return the number of layers of a model, or of its ``side``; 0 if unknown."""
    return next((int(getattr(model.config, name)) for name in _COUNTS[side] if hasattr(model.config, name)), 0)


def _outer_lists(module: nn.Module) -> list[nn.ModuleList]:
    """Return the lists of modules that are in no other."""
    found: list[nn.ModuleList] = []
    for child in module.children():
        found += [child] if isinstance(child, nn.ModuleList) else _outer_lists(child)
    return found
