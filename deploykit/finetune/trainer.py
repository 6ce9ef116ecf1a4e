"""Hugging Face's Trainer, set up for one classification run that can be killed and taken up again."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional
from torch.utils.data import Dataset
from torch.utils.tensorboard import SummaryWriter
from transformers import EarlyStoppingCallback, Trainer, TrainingArguments
from transformers.integrations import TensorBoardCallback
from transformers.trainer_utils import get_last_checkpoint

from deploykit.finetune.options import FinetuneOptions
from deploykit.metrics import classification_metrics
from deploykit.tasks import Classification

_OPTIMIZERS = {"adamw": "adamw_torch", "sgd": "sgd"}
_MOST_STEPS_BETWEEN_CHECKPOINTS = 500


class EncodedTexts(Dataset):  # type: ignore[misc]
    """Token ids and targets of a split; padded to the longest of each batch by ``collate``."""

    def __init__(self, token_ids: Sequence[list[int]], targets: NDArray[np.bool_], task: Classification) -> None:
        self.token_ids = token_ids
        self.targets = targets
        self._task = task

    def __len__(self) -> int:
        return len(self.token_ids)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {"input_ids": self.token_ids[row], "target": self.targets[row]}

    def collate(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        length = max(len(row["input_ids"]) for row in rows)
        input_ids = torch.full((len(rows), length), self._task.pad_token_id)
        attention_mask = torch.zeros((len(rows), length), dtype=torch.long)
        for i, row in enumerate(rows):
            ids = torch.tensor(row["input_ids"])
            input_ids[i, : len(ids)] = ids
            attention_mask[i, : len(ids)] = 1
        targets = torch.from_numpy(np.stack([row["target"] for row in rows]))
        labels = targets.float() if self._task.multi_label else targets.long().argmax(dim=1)
        return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def train(
    model: Any, train_set: EncodedTexts, validation_set: EncodedTexts, options: FinetuneOptions, work: Path, logs: Path
) -> Any:
    """Train ``model`` and return it as it was at its best evaluation.

    Checkpoints go to ``work``; a run that finds one there continues from it.
    """
    steps_per_epoch = math.ceil(math.ceil(len(train_set) / options.batch_size) / options.accumulation)
    total = options.max_steps or math.ceil(steps_per_epoch * options.epochs)
    every = options.eval_steps or max(1, min(steps_per_epoch, math.ceil(total / 3), _MOST_STEPS_BETWEEN_CHECKPOINTS))
    task = train_set._task
    arguments = TrainingArguments(
        output_dir=str(work),
        num_train_epochs=options.epochs,
        max_steps=options.max_steps or -1,
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=64,
        gradient_accumulation_steps=options.accumulation,
        learning_rate=options.learning_rate,
        optim=_OPTIMIZERS[options.optimizer],
        lr_scheduler_type=options.schedule,
        warmup_steps=math.ceil(options.warmup * total),
        weight_decay=options.weight_decay,
        max_grad_norm=options.max_grad_norm,
        bf16=options.mixed_precision == "bf16",
        fp16=options.mixed_precision == "fp16",
        use_cpu=not torch.cuda.is_available(),
        seed=options.seed,
        eval_strategy="steps",
        eval_steps=every,
        save_strategy="steps",
        save_steps=every,
        save_total_limit=2,
        logging_steps=max(1, min(50, total // 20)),
        load_best_model_at_end=True,
        metric_for_best_model="selection",
        greater_is_better=True,
        train_sampling_strategy="group_by_length",
        remove_unused_columns=False,
        label_names=["labels"],
        report_to="none",
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    callbacks: list[Any] = [TensorBoardCallback(SummaryWriter(log_dir=str(logs)))]
    if options.early_stopping:
        callbacks.append(EarlyStoppingCallback(options.early_stopping))
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=train_set,
        eval_dataset=validation_set,
        data_collator=train_set.collate,
        compute_loss_func=_loss(task, train_set.targets, options),
        compute_metrics=lambda prediction: _evaluate(task, prediction.predictions, prediction.label_ids),
        callbacks=callbacks,
    )
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(work)) if work.exists() else None)
    return trainer.model


def _loss(task: Classification, targets: NDArray[np.bool_], options: FinetuneOptions) -> Callable[..., torch.Tensor]:
    weights = None
    if options.class_weights == "balanced":
        counts = targets.sum(axis=0)
        weights = torch.tensor(len(targets) / (len(counts) * np.maximum(counts, 1)), dtype=torch.float32)

    def loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        logits = outputs["logits"].float()
        # Trainer adds up the micro-batches of a step as they are: each must be its share of the step's mean.
        items = num_items_in_batch if num_items_in_batch is not None else labels.numel()
        if task.multi_label:
            return functional.binary_cross_entropy_with_logits(logits, labels, reduction="sum") / items
        return (
            functional.cross_entropy(
                logits,
                labels,
                weight=None if weights is None else weights.to(logits.device),
                label_smoothing=options.label_smoothing,
                reduction="sum",
            )
            / items
        )

    return loss


def _evaluate(task: Classification, logits: NDArray[np.float32], labels: NDArray[Any]) -> dict[str, float]:
    scores = task.scores(logits)
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
