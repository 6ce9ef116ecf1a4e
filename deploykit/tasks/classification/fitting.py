"""Fit a classifier to its rows with Trainer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from deploykit.runtime.tokenizer import Encoded
from deploykit.tasks.classification.facts import Classification
from deploykit.tasks.classification.losses import distillation, divergence, summed_loss
from deploykit.tasks.classification.metrics import classification_metrics
from deploykit.tasks.classification.options import ClassificationOptions
from deploykit.training import trainer
from deploykit.training.hidden_states import HiddenTeacher
from deploykit.training.losses import Loss, TaughtTrainer
from deploykit.training.padding import padded
from deploykit.training.regularization import optimizers
from deploykit.training.rows import Say


class EncodedTexts(Dataset):  # type: ignore[misc]
    """Token ids and targets of a split; padded to the longest of each batch by ``collate``.

    ``teacher``, float32 [rows, labels], are the logits of a teacher to learn from.
    """

    def __init__(
        self, encoded: Encoded, targets: NDArray[Any], task: Classification, teacher: NDArray[np.float32] | None = None
    ) -> None:
        self.encoded = encoded
        self.targets = targets
        self.task = task
        self._teacher = teacher

    def __len__(self) -> int:
        return len(self.encoded.ids)

    def __getitem__(self, row: int) -> dict[str, Any]:
        types = {"token_type_ids": self.encoded.types[row]} if self.task.token_types else {}
        taught = {} if self._teacher is None else {"teacher": self._teacher[row]}
        return {"input_ids": self.encoded.ids[row], **types, **taught, "target": self.targets[row]}

    def collate(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        input_ids, attention_mask = padded(
            [row["input_ids"] for row in rows], self.task.pad_token_id, left=self.task.pad_left
        )
        targets = torch.from_numpy(np.stack([row["target"] for row in rows]))
        several = self.task.multi_label or self.task.regression
        labels = targets.float() if several else targets.long().argmax(dim=1)
        batch = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
        if self.task.token_types:
            batch["token_type_ids"], _ = padded([row["token_type_ids"] for row in rows], 0, left=self.task.pad_left)
        if "teacher" in rows[0]:  # not in those that Trainer evaluates with this collator
            batch["teacher"] = torch.from_numpy(np.stack([row["teacher"] for row in rows]))
        return batch


def fit(
    model: Any,
    train_set: EncodedTexts,
    validation_set: EncodedTexts | None,
    options: ClassificationOptions,
    work: Path,
    say: Say,
    hidden: HiddenTeacher | None = None,
) -> Any:
    """Train, and return ``model`` as it was at its best evaluation, if there are any: highest macro-F1, among equals the lowest loss."""
    task = train_set.task
    return trainer.run(
        _Fitting(
            options=options,
            taught=lambda outputs, teacher: distillation(
                task, outputs["logits"].float(), teacher, options.distill_temperature
            ),
            hidden=hidden,
            model=model,
            args=trainer.arguments(
                options,
                math.ceil(len(train_set) / options.per_device_train_batch_size),
                work / "trainer",
                per_device_train_batch_size=options.per_device_train_batch_size,
            ),
            train_dataset=train_set,
            eval_dataset=validation_set,
            data_collator=train_set.collate,
            loss=_loss(task, train_set.targets, options),
            compute_metrics=lambda prediction: _evaluate(task, _logits(prediction.predictions), prediction.label_ids),
            callbacks=trainer.callbacks(options, work / "tensorboard", say),
            optimizers=optimizers(model, options),
        )
    )


class _Fitting(TaughtTrainer):
    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return trainer.GroupedByLength(self.args, [len(ids) for ids in self.train_dataset.encoded.ids])


def _logits(predictions: Any) -> NDArray[np.float32]:
    """Return the logits from a model's outputs, which may also contain hidden states."""
    logits: NDArray[np.float32] = predictions[0] if isinstance(predictions, tuple) else predictions
    return logits


def _loss(task: Classification, targets: NDArray[Any], options: ClassificationOptions) -> Loss:
    weights = None
    if options.class_weights == "balanced":
        counts = targets.sum(axis=0)
        weights = torch.tensor(len(targets) / (len(counts) * np.maximum(counts, 1)), dtype=torch.float32)

    def loss(outputs: Any, labels: torch.Tensor, items_of_step: Any, passes: int) -> torch.Tensor:
        logits = outputs["logits"].float()
        # Trainer sums the losses of a step's micro-batches: scale each to its share of the step's mean.
        items = items_of_step if items_of_step is not None else labels.numel() // passes
        own = None if weights is None else weights.to(logits.device)
        summed = summed_loss(task, logits, labels, options, own)
        if passes == 2:
            summed = summed / 2 + options.r_drop * divergence(task, *logits.chunk(2))
        return summed / items

    return loss


def _evaluate(task: Classification, logits: NDArray[np.float32], labels: NDArray[Any]) -> dict[str, float]:
    scores = task.scores(logits)
    if task.regression:
        numbers = classification_metrics(task, labels, scores)
        return {"rmse": numbers["rmse"], "pearson": numbers["pearson"], "selection": -numbers["rmse"]}
    truth = labels > 0.5 if task.multi_label else np.eye(len(task.labels), dtype=bool)[labels]
    metrics = classification_metrics(task, truth, scores)
    likelihood = np.where(truth, scores, 1 - scores if task.multi_label else 1.0)
    log_loss = float(-np.log(np.maximum(likelihood, 1e-7)).sum(axis=1).mean())
    return {
        "accuracy": metrics["accuracy"],
        "macro_f1": metrics["macro_f1"],
        "log_loss": log_loss,
        # Small validation sets tie often; among equals, Trainer would keep the first and least trained.
        "selection": round(metrics["macro_f1"], 4) - 1e-5 * log_loss,
    }
