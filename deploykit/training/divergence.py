"""End a training run whose weights are no longer finite numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from transformers import TrainerCallback

from deploykit.errors import DeploykitError


class DivergedError(DeploykitError):
    """Raised when weights are NaN or infinite: no later step can make them numbers again."""

    def __init__(self, step: int, args: Any) -> None:
        mixed = ", or leave out --mixed-precision" if args.bf16 or args.fp16 else ""
        super().__init__(
            f"the training diverged: weights are NaN or infinite after step {step:,}; they are not saved",
            f"lower --learning-rate ({args.learning_rate:g}), raise --warmup-ratio{mixed}",
        )


class Divergence(TrainerCallback):  # type: ignore[misc]
    """Checks the weights before they are evaluated or saved, and when a gradient is not finite."""

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if control.should_evaluate or control.should_save:
            self._check(model, state.global_step, args)

    def on_log(
        self, args: Any, state: Any, control: Any, model: Any = None, logs: Mapping[str, Any] | None = None, **_: Any
    ) -> None:
        # With fp16 a step with such a gradient is skipped, and the weights stay as they are.
        if not math.isfinite((logs or {}).get("grad_norm", 0.0)):
            self._check(model, state.global_step, args)

    def _check(self, model: Any, step: int, args: Any) -> None:
        if not all(weights.isfinite().all() for weights in model.parameters() if weights.requires_grad):
            raise DivergedError(step, args)
