"""Print the progress of a training run: its step, its loss, and the remaining time."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from transformers import TrainerCallback

from deploykit.training.rows import Say

_OF_NO_INTEREST = ("selection", "log_loss", "runtime", "samples_per_second", "steps_per_second")


class Progress(TrainerCallback):  # type: ignore[misc]
    """Prints a line whenever Trainer logs: about the steps since the last line, or about an evaluation."""

    def __init__(self, say: Say) -> None:
        self._say = say
        self._start = (0, 0.0)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._start = (state.global_step, time.monotonic())

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **_: Any) -> None:
        logs = logs or {}
        where = f"step {state.global_step:,} of {state.max_steps:,}"
        measured = {key[5:]: value for key, value in logs.items() if key.startswith("eval_")}
        if measured:
            told = (f"{key} {value:.4f}" for key, value in measured.items() if key not in _OF_NO_INTEREST)
            self._say(f"{where}: on the validation rows {', '.join(told)}")
        elif "loss" in logs:
            self._say(
                f"{where}: loss {logs['loss']:.4f}, learning rate {logs['learning_rate']:.1e}{_speed(logs)}{self._left(state)}"
            )

    def _left(self, state: Any) -> str:
        first, then = self._start
        seconds = (time.monotonic() - then) / max(1, state.global_step - first) * (state.max_steps - state.global_step)
        if seconds < 1:
            return ""
        return f", about {seconds:.0f} s left" if seconds < 100 else f", about {seconds / 60:.0f} min left"


def _speed(logs: Mapping[str, Any]) -> str:
    return f", {logs['tokens_per_second']:,.0f} tokens/s" if "tokens_per_second" in logs else ""
