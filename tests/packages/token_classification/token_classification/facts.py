"""Define the facts of a token classifier, which go with it from fine-tuning to the server."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from deploykit.tasks.protocol import GraphKind
from deploykit.text import MAX_TEXT_CHARS, normalize

OUTSIDE = "O"
"""The label of a word that is in no entity."""


@dataclass(frozen=True)
class TokenClassification:
    """Facts of a model that labels each word of a text. Words are separated by white space.

    ``labels`` are in the order of the model's outputs. ``max_length`` counts tokens, including special ones; words
    beyond it are labelled ``O``.
    """

    name: ClassVar[str] = "token-classification"
    graph_kind: ClassVar[GraphKind] = "encoder"
    max_chars: ClassVar[int] = MAX_TEXT_CHARS

    labels: tuple[str, ...]
    max_length: int
    pad_token_id: int
    words_column: str = "words"
    label_column: str = "labels"

    @property
    def shape_limits(self) -> Mapping[str, int]:
        return {"length": self.max_length}

    @property
    def model_config(self) -> Mapping[str, Any]:
        return {
            "num_labels": len(self.labels),
            "id2label": dict(enumerate(self.labels)),
            "label2id": {label: i for i, label in enumerate(self.labels)},
        }


def words_of(text: str) -> list[str]:
    """Split a text into words as training and serving do."""
    return normalize(text).split()
