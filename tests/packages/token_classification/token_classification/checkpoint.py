"""Run a Hugging Face token classifier in PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer

from deploykit.artifacts import MANIFEST, load_manifest
from deploykit.tasks.protocol import TaskFacts
from deploykit.training.checkpoint import load_model, load_tokenizer, max_tokens, pad_token_id, quiet
from token_classification.facts import TokenClassification
from token_classification.tagger import Array, Tagger, WordTokenizer


class TorchTagger(Tagger):
    """A checkpoint run by PyTorch: the reference for every export."""

    def __init__(self, model: Any, tokenizer: Any, task: TokenClassification) -> None:
        self.model = model
        self.hub_tokenizer = tokenizer
        own = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        super().__init__(task, WordTokenizer(own, task.max_length), self.logits)

    @classmethod
    def load(cls, path: Path) -> TorchTagger:
        quiet()
        tokenizer = load_tokenizer(str(path))
        model = load_model(str(path), TokenClassification.name)
        return cls(model, tokenizer, _facts(path, tokenizer, model.config))

    def logits(self, input_ids: NDArray[np.int64], attention_mask: NDArray[np.int64]) -> Array:
        """Return raw outputs, float32 [rows, tokens, labels], of one padded batch (int64 [rows, tokens])."""
        with torch.inference_mode():
            output = self.model(input_ids=torch.from_numpy(input_ids), attention_mask=torch.from_numpy(attention_mask))
        return np.asarray(output.logits.numpy(), np.float32)


def _facts(path: Path, tokenizer: Any, config: Any) -> TokenClassification:
    """Return the facts from a checkpoint's manifest, or from its config if it was trained elsewhere."""
    if (path / MANIFEST).exists():
        facts: TaskFacts = load_manifest(path, "checkpoint", verify=False).task
        assert isinstance(facts, TokenClassification), "load_model refuses others"
        return facts
    labels = tuple(str(config.id2label[i]) for i in range(config.num_labels))
    return TokenClassification(labels, max_tokens(tokenizer, config), pad_token_id(tokenizer))
