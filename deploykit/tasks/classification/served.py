"""Classify texts with a model on a running server, through the same interface as in this process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deploykit.errors import UsageError
from deploykit.runtime.served import DEFAULT_URL, ServedModel, require_all
from deploykit.tasks.classification.facts import Classification, from_text
from deploykit.tasks.registry import task_of


@dataclass(frozen=True)
class RowResult:
    """The answer to one text. ``error`` is empty, or says why ``label`` is empty and ``scores`` 0."""

    label: str
    scores: NDArray[np.float32]
    error: str


class ServedClassifier(ServedModel):
    """The classifier ``name`` on the Triton server at ``url``; satisfies ``TextClassifier``.

    Options as for every served model: see ``ServedModel``.
    """

    def __init__(self, name: str, url: str = DEFAULT_URL, **options: Any) -> None:
        super().__init__(name, url, **options)
        if not isinstance(self.facts, Classification):
            self.close()
            raise UsageError(f"{name} {task_of(self.facts).does}, it does not classify", "use deploykit predict")
        self.task: Classification = self.facts

    def scores(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Probabilities, float32 [texts, labels]. Raises RequestError if any text has none."""
        rows = self.predict_rows(texts)
        require_all([row.error for row in rows])
        return np.array([row.scores for row in rows], np.float32).reshape(len(rows), len(self.task.labels))

    def predict_rows(self, texts: Sequence[str]) -> list[RowResult]:
        """Return one result for each text, in their order; a text that the model refuses fails alone."""
        nothing = np.zeros(len(self.task.labels), np.float32)

        def infer(chunk: list[bytes]) -> list[RowResult]:
            labels, scores, errors = self._infer(self._tensors(chunk), ("LABEL", "SCORES", "ERROR"))
            return [
                RowResult(label.decode(), row, error.decode())
                for label, row, error in zip(labels.reshape(-1), scores, errors.reshape(-1))
            ]

        return self._rows(texts, infer, lambda error: RowResult("", nothing, error))

    def _tensors(self, chunk: list[bytes]) -> dict[str, list[bytes]]:
        if not self.task.pair:
            return {"TEXT": chunk}
        firsts, seconds = zip(*(from_text(text.decode()) for text in chunk))
        return {"TEXT": [text.encode() for text in firsts], "TEXT_PAIR": [text.encode() for text in seconds]}
