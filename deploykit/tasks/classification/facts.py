"""Define what a classifier is: the facts that travel with it from fine-tuning to the server."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from deploykit.errors import DataError
from deploykit.tasks.protocol import GraphKind
from deploykit.text import MAX_TEXT_CHARS, normalize

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

LABEL_SEPARATOR = "|"
"""Between the labels of one row of a multi-label model, in data files and in answers."""


def as_text(first: str, second: str) -> str:
    """Write a pair of texts as one text, for stages whose inputs are texts: a JSON list of both, normalized; "" if both are empty."""
    both = (normalize(first), normalize(second))
    return json.dumps(both, ensure_ascii=False) if any(both) else ""


def from_text(text: str) -> tuple[str, str]:
    """Return the pair that ``as_text`` wrote, normalized. Raises DataError."""
    if not text:
        return "", ""
    try:
        first, second = json.loads(text)
        return normalize(first), normalize(second)
    except (ValueError, TypeError, AttributeError, RecursionError):
        raise DataError(
            f"{text[:40]!r} is not a pair of texts, and the model reads pairs", 'give a pair as JSON: ["one", "other"]'
        ) from None


@dataclass(frozen=True)
class Classification:
    """Facts of a model that gives one label per text, with ``multi_label`` any number of labels, or with ``regression`` a number.

    ``labels`` is the order of the model's outputs. ``max_length`` counts tokens, special ones
    included; longer texts are truncated. ``text_columns`` are joined by ``text_separator``, or with ``pair`` are two texts
    that the tokenizer reads as a pair. ``token_types``: the graph also reads which text each token belongs to.
    ``pad_left``: padding stands before the tokens, as XLNet needs, which reads the last one. Several label
    columns have 0 or 1 for the label that each is named after. In data files ``label_separator`` stands between the
    labels of a multi-label row; None is ``|``. ``temperature`` divides the logits before they become probabilities.
    """

    name: ClassVar[str] = "classification"
    graph_kind: ClassVar[GraphKind] = "encoder"
    max_chars: ClassVar[int] = MAX_TEXT_CHARS

    labels: tuple[str, ...]
    max_length: int
    pad_token_id: int
    multi_label: bool = False
    text_columns: tuple[str, ...] = ("text",)
    text_separator: str = " "
    label_column: str | tuple[str, ...] = "label"
    threshold: float = 0.5
    label_separator: str | None = None
    regression: bool = False
    pair: bool = False
    token_types: bool = False
    temperature: float = 1.0
    pad_left: bool = False

    @property
    def inputs(self) -> tuple[str, ...]:
        """The graph's inputs, in its order."""
        return ("input_ids", "attention_mask", *(("token_type_ids",) if self.token_types else ()))

    @property
    def label_columns(self) -> tuple[str, ...]:
        """``label_column`` as a tuple, also if it is one."""
        return (self.label_column,) if isinstance(self.label_column, str) else self.label_column

    @property
    def shape_limits(self) -> Mapping[str, int]:
        return {"length": self.max_length}

    @property
    def model_config(self) -> Mapping[str, Any]:
        return {
            "num_labels": len(self.labels),
            "id2label": dict(enumerate(self.labels)),
            "label2id": {label: i for i, label in enumerate(self.labels)},
            "problem_type": "regression"
            if self.regression
            else "multi_label_classification"
            if self.multi_label
            else "single_label_classification",
        }

    def read(self, text: str) -> tuple[str, ...]:
        """Return the one or two texts that the tokenizer reads, normalized. Raises DataError for a text that is not a pair."""
        return from_text(text) if self.pair else (normalize(text),)

    def scores(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """Probabilities, float32 [rows, labels], of logits of that shape; of a regression, the numbers themselves."""
        import numpy as np

        if self.regression:
            return np.asarray(logits, np.float32)
        exact = logits.astype(np.float64) / self.temperature
        if self.multi_label:
            probabilities = 1.0 / (1.0 + np.exp(-exact))
        else:
            weights = np.exp(exact - exact.max(axis=-1, keepdims=True))
            probabilities = weights / weights.sum(axis=-1, keepdims=True)
        return np.asarray(probabilities, np.float32)

    def decide(self, scores: NDArray[np.float32]) -> list[str]:
        """Return the answer for each row of ``scores``; several labels are joined by ``|``, a number is written in 6 digits."""
        if self.regression:
            return [f"{row[0]:.6g}" for row in scores]
        if self.multi_label:
            return [
                LABEL_SEPARATOR.join(label for label, s in zip(self.labels, row) if s >= self.threshold)
                for row in scores
            ]
        return [self.labels[i] for i in scores.argmax(axis=-1)]

    def targets(self, labels: Sequence[str]) -> NDArray[Any]:
        """Return the truth as bool [rows, labels], of a regression as float32 [rows, 1].

        Raises KeyError for a label that the model does not have, ValueError for a label that is not a number.
        """
        import numpy as np

        if self.regression:
            return np.array([[float(label)] for label in labels], np.float32)
        index = {label: i for i, label in enumerate(self.labels)}
        truth = np.zeros((len(labels), len(self.labels)), bool)
        for row, cell in enumerate(labels):
            for label in cell.split(LABEL_SEPARATOR) if self.multi_label else (cell,):
                if label or not self.multi_label:
                    truth[row, index[label]] = True
        return truth
