"""The losses of a classifier's training."""

from __future__ import annotations

import torch
from torch.nn import functional

from deploykit.tasks.classification.facts import Classification
from deploykit.tasks.classification.options import ClassificationOptions
from deploykit.training import losses


def summed_loss(
    task: Classification,
    logits: torch.Tensor,
    labels: torch.Tensor,
    options: ClassificationOptions,
    weights: torch.Tensor | None,
) -> torch.Tensor:
    """Return the sum of the rows' losses; ``weights`` are those of the labels.

    Of labels it is the cross-entropy, smoothed by ``label_smoothing_factor``; with ``focal_gamma`` each row's is
    multiplied by (1 - p)^gamma, p being the probability of its label (Lin et al., ICCV 2017).
    """
    if task.regression:
        return functional.mse_loss(logits, labels, reduction="sum")
    if task.multi_label:
        found = functional.binary_cross_entropy_with_logits(logits, labels, reduction="none")
        right = torch.where(labels > 0.5, logits, -logits).sigmoid()
    else:
        found = functional.cross_entropy(
            logits, labels, weight=weights, label_smoothing=options.label_smoothing_factor, reduction="none"
        )
        right = logits.softmax(dim=-1).gather(1, labels[:, None])[:, 0]
    if options.focal_gamma:
        found = found * (1 - right) ** options.focal_gamma
    return found.sum()


def divergence(task: Classification, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Return the sum over rows of the divergence of two passes, for R-Drop; of numbers, the squared difference."""
    if task.regression:
        return functional.mse_loss(first, second, reduction="sum")
    if task.multi_label:
        first, second = (torch.stack([logits, torch.zeros_like(logits)], dim=-1) for logits in (first, second))
    return losses.divergence(first, second)


def distillation(task: Classification, logits: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return the sum over rows of the distance of the student from the teacher, both at ``temperature``; of numbers, the squared
    difference."""
    if task.regression:
        return functional.mse_loss(logits, teacher, reduction="sum")
    if task.multi_label:
        logits, teacher = (torch.stack([each, torch.zeros_like(each)], dim=-1) for each in (logits, teacher))
    return losses.soft_targets(logits, teacher, temperature)
