"""Regularize a training: freeze layers, set learning rates by layer, and penalize weights."""

from __future__ import annotations

import re
from typing import Any

import torch
from transformers import TrainerCallback

from deploykit.errors import UsageError
from deploykit.training.averaging import Averaging
from deploykit.training.options import FinetuneOptions

_LAYER = re.compile(r"\.(?:layer|layers|h|block|blocks|transformer_layers)\.(\d+)\.")
_EMBEDDINGS = re.compile(r"(?:^|\.)(?:\w*embed\w*|shared|wte|wpe)(?:\.|$)")
_NO_DECAY = re.compile(r"(?:bias|norm\w*\.weight|ln_\w+\.weight)$", re.IGNORECASE)


def depth_of(name: str, layers: int) -> int:
    """Return how deep a parameter lies: 0 for embeddings, 1 for the lowest layer, ``layers`` + 1 for all above (pooler,
    head)."""
    if (found := _LAYER.search(name)) is not None:
        return int(found[1]) + 1
    return 0 if _EMBEDDINGS.search(name) else layers + 1


def count_layers(model: Any) -> int:
    """Return the number of layers of a model (of a translator, of the deeper side)."""
    numbers = [int(found[1]) for name, _ in model.named_parameters() if (found := _LAYER.search(name)) is not None]
    return max(numbers, default=-1) + 1


def known_layers(model: Any, option: str) -> int:
    """Return the number of layers. Raises UsageError naming ``option`` if the model's parameters are not named by layer."""
    layers = count_layers(model)
    if not layers:
        raise UsageError(f"{option}: deploykit does not know the layers of a {model.config.model_type}", "leave it out")
    return layers


def optimizers(model: Any, options: FinetuneOptions) -> tuple[Any, None]:
    """Return the optimizer for ``Trainer(optimizers=...)``: None for its own, or with ``layerwise_lr_decay`` one whose
    learning rate is multiplied by it from each layer to the one below (Howard and Ruder, ACL 2018)."""
    if options.layerwise_lr_decay == 1:
        return None, None
    layers = known_layers(model, "--layerwise-lr-decay")
    groups: dict[tuple[int, bool], list[Any]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            key = depth_of(name, layers), _NO_DECAY.search(name) is None
            groups.setdefault(key, []).append(parameter)
    settings = [
        {
            "params": parameters,
            "lr": options.learning_rate * options.layerwise_lr_decay ** (layers + 1 - depth),
            "weight_decay": options.weight_decay if decays else 0.0,
        }
        for (depth, decays), parameters in sorted(groups.items(), key=lambda item: item[0])
    ]
    if options.optimizer == "sgd":
        return torch.optim.SGD(settings, lr=options.learning_rate), None
    return torch.optim.AdamW(settings, lr=options.learning_rate), None


def regularization_callbacks(options: FinetuneOptions) -> list[Any]:
    """Return the callbacks for the given options."""
    found: list[Any] = []
    if options.freeze_layers or options.gradual_unfreezing:
        found.append(_Freezing(options.freeze_layers, options.gradual_unfreezing))
    if options.l1 or options.l2:
        found.append(_Penalties(options.l1, options.l2))
    if options.ema_decay or options.swa_start:  # after those that change the weights
        found.append(Averaging(options.ema_decay, options.swa_start))
    return found


class _Freezing(TrainerCallback):  # type: ignore[misc]
    """Keeps the ``lowest`` layers and the embeddings unchanged, and unfreezes the others from the top, one by one in the
    first ``share`` of the run. The optimizer skips parameters without a gradient, so nothing decays meanwhile."""

    def __init__(self, lowest: int, share: float) -> None:
        self._lowest = lowest
        self._share = share

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self._layers = known_layers(model, "--freeze-layers" if self._lowest else "--gradual-unfreezing")
        if self._lowest > self._layers:
            raise UsageError(
                f"--freeze-layers is {self._lowest}", f"the model has {self._layers} layers: give at most as many"
            )
        # An adapter's run trains few of the parameters: the others stay frozen.
        self._own = {name for name, parameter in model.named_parameters() if parameter.requires_grad}

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        layers = self._layers
        lowest = self._lowest if self._lowest else -1
        if self._share:
            done = state.global_step / state.max_steps / self._share
            # The head learns from the first step on, the embeddings come last.
            lowest = max(lowest, layers - int(min(done, 1.0) * (layers + 1)))
        for name, parameter in model.named_parameters():
            if parameter.is_floating_point() and name in self._own:
                parameter.requires_grad_(depth_of(name, layers) > lowest)


class _Penalties(TrainerCallback):  # type: ignore[misc]
    """Adds the gradient of l2 / 2 |w|² before each step, and after it moves each weight by l1 times the learning rate
    towards 0, where it stays (the proximal step of ISTA). Biases and norms are spared, as by weight decay."""

    def __init__(self, l1: float, l2: float) -> None:
        self._l1, self._l2 = l1, l2

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if self._l2:
            for name, parameter in model.named_parameters():
                if parameter.grad is not None and _NO_DECAY.search(name) is None:
                    parameter.grad.add_(parameter.detach(), alpha=self._l2)

    def on_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **_: Any
    ) -> None:
        if not self._l1:
            return
        rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.grad is not None and _NO_DECAY.search(name) is None:
                    step = self._l1 * rates.get(id(parameter), 0.0)
                    parameter.copy_(torch.nn.functional.softshrink(parameter, step) if step else parameter)
