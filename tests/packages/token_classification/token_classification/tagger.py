"""Label the words of texts with any engine. Imports neither torch nor transformers, because servers load it too."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from deploykit.runtime.batching import DEFAULT_TOKEN_BUDGET, batches
from deploykit.runtime.engines.protocol import Engine
from token_classification.facts import OUTSIDE, TokenClassification, words_of

Array = NDArray[np.float32]
Run = Callable[[NDArray[np.int64], NDArray[np.int64]], Array]
"""Logits, float32 [rows, tokens, labels], of token ids and mask, both int64 [rows, tokens]."""


class TextTagger(Protocol):
    """A token classifier in this process or on a server."""

    task: TokenClassification

    def tag(self, texts: Sequence[str]) -> list[list[str]]:
        """Return the labels of each text's words."""

    def close(self) -> None:
        """Release connections."""


class WordTokenizer:
    """A tokenizer that also returns the first token of each word."""

    def __init__(self, tokenizer: Tokenizer, max_length: int) -> None:
        self._tokenizer = tokenizer
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(max_length)

    def encode(self, texts: Sequence[str]) -> tuple[list[list[int]], list[list[int]]]:
        """Return the ids of each text, and the index of each word's first token, -1 if it was cut off."""
        words = [words_of(text) for text in texts]
        encodings = self._tokenizer.encode_batch(words, is_pretokenized=True)
        firsts = []
        for encoding, own in zip(encodings, words):
            first = [-1] * len(own)
            for place, word in enumerate(encoding.word_ids):
                if word is not None and first[word] < 0:
                    first[word] = place
            firsts.append(first)
        return [encoding.ids for encoding in encodings], firsts


class Tagger:
    """A tokenizer and a model. Not for concurrent calls."""

    def __init__(
        self, task: TokenClassification, tokenizer: WordTokenizer, run: Run, token_budget: int = DEFAULT_TOKEN_BUDGET
    ) -> None:
        self.task = task
        self.tokenizer = tokenizer
        self._run = run
        self._token_budget = token_budget

    def word_logits(self, texts: Sequence[str]) -> list[Array]:
        """Return the logits of each text's words, float32 [words, labels]; words that were cut off get label ``O``."""
        token_ids, firsts = self.tokenizer.encode(texts)
        outside = np.array([0.0 if label == OUTSIDE else -1e4 for label in self.task.labels], np.float32)
        found: list[Array] = [np.tile(outside, (len(first), 1)) for first in firsts]
        for batch in batches(
            token_ids, self.task.pad_token_id, max_length=self.task.max_length, token_budget=self._token_budget
        ):
            for row, logits in zip(batch.rows, self._run(batch.input_ids, batch.attention_mask)):
                for word, place in enumerate(firsts[row]):
                    if place >= 0:
                        found[row][word] = logits[place]
        return found

    def tag(self, texts: Sequence[str]) -> list[list[str]]:
        """Return the label of each word of each text: that of the word's first token."""
        return decide(self.task, self.word_logits(texts))

    def close(self) -> None:
        """Do nothing: the engine is freed with the object."""


def decide(task: TokenClassification, logits: Sequence[Array]) -> list[list[str]]:
    """Return the most probable label of each row of ``logits``."""
    return [[task.labels[i] for i in rows.argmax(axis=-1)] for rows in logits]


def load_tagger(folder: Path, task: TokenClassification, engine: Engine, token_budget: int = 0) -> Tagger:
    """Create a tagger from a folder with a tokenizer.json and a loaded engine."""

    def run(input_ids: NDArray[np.int64], attention_mask: NDArray[np.int64]) -> Array:
        logits: Array = engine.run({"input_ids": input_ids, "attention_mask": attention_mask})[0]
        return logits

    tokenizer = WordTokenizer(Tokenizer.from_file(str(folder / "tokenizer.json")), task.max_length)
    return Tagger(task, tokenizer, run, token_budget or engine.token_budget)
