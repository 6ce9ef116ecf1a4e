"""Fine-tune a token classifier on rows of words and labels."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import AutoConfig, Trainer

from deploykit.data.grouping import group_key
from deploykit.errors import DataError, UsageError
from deploykit.training import trainer
from deploykit.training.checkpoint import load_for_training, load_tokenizer, max_tokens, pad_token_id
from deploykit.training.padding import padded
from deploykit.training.regularization import optimizers
from deploykit.training.rows import Rows, Say
from deploykit.training.trainer import Trained
from token_classification.checkpoint import TorchTagger
from token_classification.entities import entity_metrics
from token_classification.facts import TokenClassification
from token_classification.options import TokenClassificationOptions
from token_classification.rows import (
    CleaningReport,
    Columns,
    Example,
    RawExample,
    check_labels,
    clean,
    label_names,
    load_examples,
    split_rows,
)

_IGNORED = -100
"""The target of a token that is not the first of a word: PyTorch's cross-entropy leaves it out."""


class TokenClassificationStage:
    """One training run, from checking the options to measuring the model."""

    def __init__(self, options: TokenClassificationOptions) -> None:
        self._options = options
        self._tokenizer = load_tokenizer(options.origin)
        limit = max_tokens(self._tokenizer, AutoConfig.from_pretrained(options.origin, trust_remote_code=False))
        if options.max_length > limit:
            raise UsageError(
                f"--max-length is {options.max_length}, but {options.origin} takes at most {limit} tokens",
                f"give --max-length {limit} or less",
            )

    def load(self, source: str, split: str, columns: Columns | None) -> tuple[list[RawExample], Columns]:
        options = self._options
        words, labels = (columns.words, columns.labels) if columns else (options.words_column, options.label_column)
        return load_examples(source, words, labels, reading=options, split=split)

    def clean(self, raw: Sequence[RawExample]) -> tuple[list[Example], CleaningReport]:
        return clean(raw)

    def check(self, splits: Mapping[str, Sequence[Example]]) -> None:
        labels = label_names(splits["train"])
        if len(labels) < 2:
            raise DataError(f"{self._options.train}: no word has a label but O", "give rows with entities")
        for name in ("validation", "test"):
            check_labels(splits[name], labels, str(getattr(self._options, name)))

    def drop_leaks(self, train: Sequence[Example], held_out: Sequence[Example]) -> tuple[list[Example], int]:
        held = {group_key(row.words) for row in held_out}
        kept = [row for row in train if group_key(row.words) not in held]
        return kept, len(train) - len(kept)

    def take(self, rows: Sequence[Example], count: int) -> list[Example]:
        return split_rows(rows, validation=count / len(rows), test=0, seed=self._options.seed)[1]

    def split(
        self, rows: Sequence[Example], *, validation: float, test: float
    ) -> tuple[list[Example], list[Example], list[Example]]:
        train, held, last = split_rows(rows, validation=validation, test=test, seed=self._options.seed)
        return train, held, last

    def train(self, rows: Rows[Example, Columns], work: Path, say: Say) -> Trained:
        options = self._options
        task = TokenClassification(
            label_names(rows.splits["train"]), options.max_length, pad_token_id(self._tokenizer),
            rows.columns.words, rows.columns.labels,
        )  # fmt: skip
        for name in ("validation", "test"):
            check_labels(rows.splits[name], task.labels, name)
        loaded = load_for_training(options.origin, task.name, **task.model_config, pad_token_id=task.pad_token_id)
        model = loaded.model
        if options.lora_r:
            model = trainer.with_adapter(model, options, "TOKEN_CLS", loaded.new)
        tagger = TorchTagger(model, self._tokenizer, task)
        encoded = {name: EncodedRows(tagger, split) for name, split in rows.splits.items() if split}
        say(f"training on {len(encoded['train']):,} rows, validating on {len(rows.splits['validation']):,}")
        model = trainer.run(
            Trainer(
                model=model,
                args=trainer.arguments(
                    options, math.ceil(len(encoded["train"]) / options.per_device_train_batch_size), work / "trainer",
                    per_device_train_batch_size=options.per_device_train_batch_size, label_smoothing_factor=options.label_smoothing_factor,
                ),
                train_dataset=encoded["train"],
                eval_dataset=encoded.get("validation"),
                data_collator=encoded["train"].collate,
                compute_metrics=lambda given: _measure(task, given.predictions, given.label_ids),
                callbacks=trainer.callbacks(options, work / "tensorboard", say),
                optimizers=optimizers(model, options),
            )
        )  # fmt: skip
        say("measuring on the held-out rows")
        tagger = TorchTagger(model, self._tokenizer, task)
        metrics = {name: _metrics(tagger, rows.splits[name]) for name in ("validation", "test") if rows.splits[name]}
        return Trained(task, model, self._tokenizer, metrics)


class EncodedRows(Dataset):  # type: ignore[misc]
    """A dataset of token ids and targets, padded per batch by ``collate``."""

    def __init__(self, tagger: TorchTagger, rows: Sequence[Example]) -> None:
        self._task = tagger.task
        index = {label: i for i, label in enumerate(tagger.task.labels)}
        self._token_ids, firsts = tagger.tokenizer.encode([row.words for row in rows])
        self._targets = []
        for row, ids, first in zip(rows, self._token_ids, firsts):
            targets = [_IGNORED] * len(ids)
            for place, label in zip(first, row.labels.split()):
                if place >= 0:
                    targets[place] = index[label]
            self._targets.append(targets)

    def __len__(self) -> int:
        return len(self._token_ids)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {"input_ids": self._token_ids[row], "targets": self._targets[row]}

    def collate(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        input_ids, attention_mask = padded([row["input_ids"] for row in rows], self._task.pad_token_id)
        labels, _ = padded([row["targets"] for row in rows], _IGNORED)
        return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def _measure(task: TokenClassification, logits: Any, targets: Any) -> dict[str, float]:
    """Compute the metrics of an evaluation during training; ``selection`` chooses the best step."""
    truth, answers = [], []
    right, words = 0.0, 0
    for row, target in zip(np.asarray(logits), np.asarray(targets)):
        labelled = target != _IGNORED
        truth.append([task.labels[i] for i in target[labelled]])
        answers.append([task.labels[i] for i in row[labelled].argmax(axis=-1)])
        exact = row[labelled].astype(np.float64)
        exact -= exact.max(axis=-1, keepdims=True)
        likelihood = exact - np.log(np.exp(exact).sum(axis=-1, keepdims=True))
        right += float(likelihood[np.arange(len(exact)), target[labelled]].sum())
        words += len(exact)
    metrics = entity_metrics(truth, answers)
    log_loss = -right / max(words, 1)
    # Small validation sets tie often: of equals prefer the most confident.
    selection = round(metrics["entity_f1"], 4) - 1e-5 * log_loss
    return {"entity_f1": metrics["entity_f1"], "accuracy": metrics["accuracy"], "log_loss": log_loss,
            "selection": selection}  # fmt: skip


def _metrics(tagger: TorchTagger, rows: Sequence[Example]) -> dict[str, Any]:
    return entity_metrics([row.labels.split() for row in rows], tagger.tag([row.words for row in rows]))
