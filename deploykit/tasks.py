"""What a model is for: the facts that travel with it from fine-tuning to the server.

A task is one axis of change (the engine is the other): a new task is a dataclass here and one line
in ``TASKS``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from deploykit.errors import ArtifactError

LABEL_SEPARATOR = "|"
"""Between the labels of one row of a multi-label model, in data files and in answers."""


@dataclass(frozen=True)
class Classification:
    """One label a text, or with ``multi_label`` any number of them.

    ``labels`` is the order of the model's outputs. ``max_length`` counts tokens, special ones
    included; longer texts are truncated. ``text_columns`` are joined by ``text_separator``.
    """

    name: ClassVar[str] = "classification"

    labels: tuple[str, ...]
    max_length: int
    pad_token_id: int
    multi_label: bool = False
    text_columns: tuple[str, ...] = ("text",)
    text_separator: str = " "
    label_column: str = "label"
    threshold: float = 0.5

    def scores(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """Probabilities, float32 [rows, labels], of logits of that shape."""
        exact = logits.astype(np.float64)
        if self.multi_label:
            probabilities = 1.0 / (1.0 + np.exp(-exact))
        else:
            weights = np.exp(exact - exact.max(axis=-1, keepdims=True))
            probabilities = weights / weights.sum(axis=-1, keepdims=True)
        return np.asarray(probabilities, np.float32)

    def decide(self, scores: NDArray[np.float32]) -> list[str]:
        """The answer for each row of ``scores``; several labels are joined by ``|``."""
        if self.multi_label:
            return [
                LABEL_SEPARATOR.join(label for label, s in zip(self.labels, row) if s >= self.threshold)
                for row in scores
            ]
        return [self.labels[i] for i in scores.argmax(axis=-1)]

    def targets(self, labels: Sequence[str]) -> NDArray[np.bool_]:
        """Truth as bool [rows, labels]. Raises KeyError for a label the model does not have."""
        index = {label: i for i, label in enumerate(self.labels)}
        truth = np.zeros((len(labels), len(self.labels)), bool)
        for row, cell in enumerate(labels):
            for label in cell.split(LABEL_SEPARATOR) if self.multi_label else (cell,):
                if label or not self.multi_label:
                    truth[row, index[label]] = True
        return truth


Task = Classification

TASKS: Mapping[str, type[Task]] = {Classification.name: Classification}


def task_to_json(task: Task) -> dict[str, Any]:
    return {"name": task.name, **dataclasses.asdict(task)}


def task_from_json(record: Mapping[str, Any]) -> Task:
    """Rebuild a task from a manifest. Raises ArtifactError for a task this version does not know."""
    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in record.items() if k != "name"}
    try:
        return TASKS[record["name"]](**fields)
    except (KeyError, TypeError) as error:
        raise ArtifactError(
            f"the manifest describes a task this version of deploykit cannot read: {error}",
            "upgrade deploykit, or make the artifact again",
        ) from error
