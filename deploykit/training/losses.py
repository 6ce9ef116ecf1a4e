"""Losses that several tasks add to their own: R-Drop, and the distance from a teacher."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn import functional
from transformers import Trainer

from deploykit.errors import UsageError
from deploykit.training.hidden_states import HiddenTeacher, states_of
from deploykit.training.options import FinetuneOptions

_DROPOUTS = ("dropout", "pdrop")
_LOGITS_AT_ONCE = 1 << 23
"""Number of logits that ``in_parts`` reads at a time: 32 MB in fp32."""


def divergence(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Return the sum over rows of the divergence of two passes' logits, for R-Drop (Wu et al., NeurIPS 2021): half of the
    Kullback-Leibler divergences both ways."""
    a, b = first.log_softmax(dim=-1), second.log_softmax(dim=-1)
    return 0.5 * ((a.exp() - b.exp()) * (a - b)).sum()


def token_divergence(logits: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
    """Return the divergence of the two halves of logits, float [2 x tokens, vocabulary], summed over the tokens that are ``known``,
    bool [tokens]."""
    pairs = torch.stack(logits.chunk(2), dim=1)[known]
    return in_parts(pairs, lambda part, _: divergence(part[:, 0], part[:, 1]))


def in_parts(logits: torch.Tensor, loss_of: Callable[[torch.Tensor, slice], torch.Tensor]) -> torch.Tensor:
    """Return the sum of ``loss_of`` over parts of the rows of ``logits``, in fp32. It gets a part, and which rows these are.

    The gradient is computed with the sum, so that the memory of each part is freed before the next: it does not grow with
    batch and vocabulary.
    """
    found: torch.Tensor = _InParts.apply(logits, loss_of)
    return found


class _InParts(torch.autograd.Function):  # type: ignore[misc]
    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, loss_of: Callable[[torch.Tensor, slice], torch.Tensor]) -> torch.Tensor:
        gradient, total = torch.empty_like(logits), torch.zeros((), device=logits.device)
        rows = max(1, _LOGITS_AT_ONCE // max(1, logits[:1].numel()))
        for first in range(0, len(logits), rows):
            own = slice(first, first + rows)
            with torch.enable_grad():
                part = logits[own].detach().float().requires_grad_()
                loss = loss_of(part, own)
                [gradient[own]] = torch.autograd.grad(loss, part)
            total += loss.detach()
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, upper: torch.Tensor) -> tuple[torch.Tensor, None]:
        [gradient] = ctx.saved_tensors
        return gradient.mul_(upper), None


def soft_targets(logits: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return the sum over rows of the Kullback-Leibler divergence of the student's logits from the teacher's, both at
    ``temperature``, times its square (Hinton et al., 2015)."""
    ours, theirs = ((each / temperature).log_softmax(dim=-1) for each in (logits, teacher))
    return temperature**2 * functional.kl_div(ours, theirs, log_target=True, reduction="sum")


def check_dropout(model: Any, remedy: str) -> None:
    """Raise UsageError for a model without dropout: R-Drop's two passes would be the same."""
    settings = ((name, value) for name, value in model.config.to_dict().items() if name.endswith(_DROPOUTS))
    if any(isinstance(value, int | float) and value > 0 for name, value in settings) or any(
        isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules()
    ):
        return
    raise UsageError("--r-drop compares two passes with different dropout, and the model has none", remedy)


class Loss(Protocol):
    def __call__(self, outputs: Any, labels: torch.Tensor, items_of_step: Any, passes: int) -> torch.Tensor:
        """Return the loss of a task for a batch that was passed ``passes`` times, once or (R-Drop) twice: ``labels`` are those
        of the passes, one after the other. ``items_of_step`` counts the labels of all batches of the step; None outside of
        training."""


class TaughtTrainer(Trainer):  # type: ignore[misc]
    """A Trainer that passes each batch twice for R-Drop, with different dropout, and adds the loss against a teacher.

    ``taught`` returns the summed distance of a model's outputs from the batch's "teacher". The task's ``loss`` adds the divergence of
    two passes.
    """

    def __init__(
        self,
        *words: Any,
        options: FinetuneOptions,
        loss: Loss,
        taught: Callable[[Any, torch.Tensor], torch.Tensor] | None = None,
        hidden: HiddenTeacher | None = None,
        **named: Any,
    ) -> None:
        super().__init__(*words, compute_loss_func=self._loss_of_passes, **named)
        self._loss, self._passes = loss, 1
        self._options: Any = options
        self._taught = taught
        self._hidden = hidden

    def _loss_of_passes(self, outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        return self._loss(outputs, labels, num_items_in_batch, self._passes)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        options, teacher, labels = self._options, inputs.pop("teacher", None), inputs["labels"]
        items = labels.numel() if num_items_in_batch is None else num_items_in_batch
        hidden = self._hidden if model.training else None
        theirs = hidden.states(inputs) if hidden is not None else ()
        self._passes = passes = 2 if model.training and options.r_drop else 1
        if passes == 2:
            inputs = {name: torch.cat([tensor, tensor]) for name, tensor in inputs.items()}
        if hidden is not None:
            inputs["output_hidden_states"] = True
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        share = 1 / (passes * items)
        if num_items_in_batch is not None:  # over all processes, whose gradients are averaged
            share = share * self.accelerator.num_processes
        if teacher is not None:
            assert self._taught is not None
            taught = share * self._taught(outputs, torch.cat([teacher] * passes))
            loss = (1 - options.distill_alpha) * loss + options.distill_alpha * taught
        if hidden is not None:
            theirs = [state.repeat(passes, 1, 1) for state in theirs]
            apart = hidden.distance(states_of(outputs), theirs, inputs["attention_mask"])
            # ``items`` are labels, and distances are of rows.
            loss = loss + options.distill_hidden * share * (labels.numel() / len(labels)) * apart
        return (loss, outputs) if return_outputs else loss
