"""Averages of the weights over the steps of a run.

torch's AveragedModel keeps a copy of the whole model, which Trainer does not save with its checkpoints.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from deploykit.errors import ArtifactError

_FILE = "average.safetensors"


class Averaging(TrainerCallback):  # type: ignore[misc]
    """Evaluates, and at the end returns, an average of the weights instead of those of a step.

    With ``ema_decay`` the average is exponential: each step keeps that share of it, less in the first steps. With ``swa_start`` it is
    the mean of all steps after that share of the run (Izmailov et al., UAI 2018). The average is saved with each checkpoint,
    so that a killed run continues with it, and that of the best evaluation is returned.
    """

    def __init__(self, ema_decay: float, swa_start: float) -> None:
        self._decay, self._start = ema_decay, swa_start
        self._average: dict[str, torch.Tensor] = {}
        self._own: dict[str, torch.Tensor] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        saved = _path(args, state.global_step)
        if state.global_step and not saved.is_file():  # killed after the checkpoint and before its average
            raise ArtifactError(f"{saved.parent}: has no average of the weights", "start over: --restart")
        self._average = load_file(saved) if state.global_step else _copies(model)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        kept = self._kept(state.global_step, state.max_steps)
        with torch.no_grad():
            for name, parameter in _weights(model):
                self._average[name].lerp_(parameter.detach().to(self._average[name].device), 1 - kept)
        if control.should_evaluate:
            self._own = _copies(model)
            _load(model, self._average)

    def on_evaluate(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if self._own:  # none before the first step
            _load(model, self._own)
            self._own = {}

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        save_file({name: tensor.contiguous() for name, tensor in self._average.items()}, _path(args, state.global_step))

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        best = state.best_model_checkpoint
        _load(model, self._average if best is None else load_file(Path(best) / _FILE))

    def _kept(self, step: int, steps: int) -> float:
        """Return the share of the average that stays after ``step``."""
        if self._decay:
            return min(self._decay, step / (step + 9))  # otherwise the initial checkpoint would dominate
        averaged = step - max(1, round(self._start * steps))
        return averaged / (averaged + 1) if averaged > 0 else 0.0


def _path(args: Any, step: int) -> Path:
    return Path(args.output_dir) / f"checkpoint-{step}" / _FILE


def _weights(model: Any) -> list[tuple[str, Any]]:
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.is_floating_point()]


def _copies(model: Any) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in _weights(model)}


def _load(model: Any, weights: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in _weights(model):
            parameter.copy_(weights[name])
