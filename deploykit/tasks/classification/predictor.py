"""Classify texts in the calling process: strings in, probabilities out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from deploykit.runtime.batching import Batch, batches, padded_types
from deploykit.runtime.engines.protocol import Engine
from deploykit.runtime.finite import NoNumberError
from deploykit.runtime.tokenizer import Encoded, TextTokenizer
from deploykit.runtime.tracing import stage
from deploykit.tasks.classification.facts import Classification


class Classifier:
    """Tokenizer, batches and engine of one exported model. One caller at a time."""

    def __init__(
        self,
        task: Classification,
        tokenizer: TextTokenizer,
        engine: Engine,
        *,
        token_budget: int = 0,
    ) -> None:
        self.task = task
        self._tokenizer = tokenizer
        self._engine = engine
        self._token_budget = token_budget or engine.token_budget

    def scores(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Probabilities, float32 [texts, labels], in the order of ``texts`` and ``task.labels``.

        A text's scores do not depend on other texts. A pair is written as one text (``facts.as_text``). Raises
        DataError for a text that is not a pair, or has no token, or for which the model computes no number.
        """
        return self.task.scores(finite(self.logits(texts)))

    def logits(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Return raw outputs, float32 [texts, labels], as ``scores`` does, but also those that are not finite."""
        with stage("tokenize"):
            encoded = self._tokenizer.encode([self.task.read(text) for text in texts])
        logits = np.empty((len(texts), len(self.task.labels)), np.float32)
        for batch in batches(
            encoded.ids, self.task.pad_token_id, max_length=self.task.max_length, token_budget=self._token_budget,
            pad_left=self.task.pad_left, buckets=self._engine.computes_padding,
        ):  # fmt: skip
            with stage("encode"):
                logits[batch.rows] = self._engine.run(graph_inputs(self.task, encoded, batch))[0]
        return logits

    def close(self) -> None:
        """Do nothing: the engine is freed with the object."""


def finite(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return ``logits``. Raises DataError if one is NaN or infinite."""
    if not np.isfinite(logits).all():
        raise NoNumberError()
    return logits


def graph_inputs(task: Classification, encoded: Encoded, batch: Batch) -> dict[str, NDArray[np.int64]]:
    """Return the graph's inputs of a batch of ``encoded``, int64 [rows, padded length] each, by name."""
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    if task.token_types:
        inputs["token_type_ids"] = padded_types(batch.input_ids, encoded.types, batch.rows, pad_left=task.pad_left)
    return inputs


def load_classifier(folder: Path, task: Classification, engine: Engine, *, token_budget: int = 0) -> Classifier:
    """Assemble a classifier from a folder with a tokenizer.json and an engine already loaded.

    ``token_budget`` limits the tokens of one run of the engine (padding counts if the engine computes it); 0 is the engine's own default.
    """
    tokenizer = TextTokenizer(folder / "tokenizer.json", task.max_length)
    return Classifier(task, tokenizer, engine, token_budget=token_budget)


class TextClassifier(Protocol):
    """Texts in, probabilities out."""

    task: Classification

    def scores(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Probabilities, float32 [texts, labels]."""

    def close(self) -> None:
        """Release connections."""
