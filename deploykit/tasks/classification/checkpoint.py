"""Run a Hugging Face classifier in PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from deploykit.artifacts import MANIFEST, load_manifest
from deploykit.errors import ArtifactError
from deploykit.runtime.batching import batches
from deploykit.tasks.classification.facts import Classification
from deploykit.tasks.protocol import TaskFacts
from deploykit.text import normalize
from deploykit.training.checkpoint import load_model, load_tokenizer, max_tokens, pad_token_id, quiet


def task_of(path: Path, tokenizer: Any, config: Any) -> Classification:
    """The task in a checkpoint's manifest, or, for one trained elsewhere, what its config says."""
    if (path / MANIFEST).exists():
        task: TaskFacts = load_manifest(path, "checkpoint", verify=False).task
        assert isinstance(task, Classification), "load_model refuses others"
        return task
    regression = config.problem_type == "regression" or (config.problem_type is None and config.num_labels == 1)
    if config.num_labels != 1 and regression:
        raise ArtifactError(
            f"{path}: its head gives {config.num_labels} numbers (problem_type regression), and one is served",
            "fine-tune the checkpoint with --regression",
        )
    labels = tuple(str(config.id2label[i]) for i in range(config.num_labels))
    return Classification(
        labels=labels,
        max_length=max_tokens(tokenizer, config),
        pad_token_id=pad_token_id(tokenizer),
        multi_label=config.problem_type == "multi_label_classification",
        regression=regression,
    )


class TorchClassifier:
    """A checkpoint run by PyTorch: the reference every export is compared with."""

    def __init__(self, model: Any, tokenizer: Any, task: Classification) -> None:
        self.task = task
        self.model = model
        self.tokenizer = tokenizer

    @classmethod
    def load(cls, path: Path) -> TorchClassifier:
        quiet()
        tokenizer, model = load_tokenizer(str(path)), load_model(str(path))
        task = task_of(path, tokenizer, model.config)
        if model.config.pad_token_id is None:  # a decoder's head reads the last token that is no padding
            model.config.pad_token_id = task.pad_token_id
        return cls(model, tokenizer, task)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids as training and serving see them."""
        encoded = self.tokenizer([normalize(text) for text in texts], truncation=True, max_length=self.task.max_length)
        return [list(ids) for ids in encoded["input_ids"]]

    def logits(self, input_ids: NDArray[np.int64], attention_mask: NDArray[np.int64]) -> NDArray[np.float32]:
        """Raw outputs, float32 [rows, labels], of one padded batch (int64 [rows, tokens])."""
        with torch.inference_mode():
            output = self.model(input_ids=torch.from_numpy(input_ids), attention_mask=torch.from_numpy(attention_mask))
        return np.asarray(output.logits.numpy(), np.float32)

    def scores(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Probabilities, float32 [texts, labels]."""
        logits = np.empty((len(texts), len(self.task.labels)), np.float32)
        for batch in batches(self.encode(texts), self.task.pad_token_id, max_length=self.task.max_length):
            logits[batch.rows] = self.logits(batch.input_ids, batch.attention_mask)
        return self.task.scores(logits)

    def scores_alone(self, text: str) -> NDArray[np.float32]:
        """Probabilities, float32 [1, labels], as a user of transformers gets them: no batch, no padding, and all that
        the checkpoint's tokenizer gives (token types, say) goes into the model."""
        encoded = self.tokenizer(normalize(text), truncation=True, max_length=self.task.max_length, return_tensors="pt")
        with torch.inference_mode():
            logits = self.model(**encoded).logits
        return self.task.scores(np.asarray(logits.float().numpy(), np.float32))

    def close(self) -> None:
        """Nothing to release: the model goes with the object."""
