"""Compute the answers of a teacher, from which a student learns."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from deploykit.attribution.explain import log_odds
from deploykit.errors import UsageError
from deploykit.runtime.served import DEFAULT_URL
from deploykit.tasks.classification.checkpoint import TorchClassifier
from deploykit.tasks.classification.facts import Classification
from deploykit.tasks.opening import open_predictor
from deploykit.tasks.registry import task_of
from deploykit.training.checkpoint import max_tokens
from deploykit.training.hidden_states import HiddenTeacher

_AT_ONCE = 256


class Teacher:
    """A classifier whose answers a student learns: a checkpoint, an export, or the name of a served model."""

    def __init__(self, target: str, task: Classification) -> None:
        """Raise UsageError if the teacher does not give the labels of ``task``."""
        self._predictor: Any = open_predictor(target, url=DEFAULT_URL)
        found = self._predictor.task
        if not isinstance(found, Classification):
            raise UsageError(f"--teacher {target} {task_of(found).does}", "give a classifier")
        if (found.pair, found.multi_label, found.regression) != (task.pair, task.multi_label, task.regression):
            raise UsageError(
                f"--teacher {target} was trained with other options than the student",
                "give one trained with the same number of text columns, --multi-label and --regression",
            )
        if sorted(found.labels) != sorted(task.labels):
            raise UsageError(
                f"--teacher {target} answers {', '.join(found.labels)}, and the student {', '.join(task.labels)}",
                "give a teacher that was trained on the same labels",
            )
        self._task = task
        self._order = [found.labels.index(label) for label in task.labels]

    def logits(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Return logits, float32 [texts, labels], in the student's order; for a regression the numbers."""
        scores = self.scores(texts)
        if self._task.regression:
            return scores
        exact = scores.astype(np.float64)
        logits = log_odds(exact) if self._task.multi_label else np.log(np.clip(exact, 1e-7, 1 - 1e-7))
        return np.asarray(logits, np.float32)

    def checkpoint(self) -> TorchClassifier:
        """Return the model itself. Raises UsageError if it is not a checkpoint."""
        if not isinstance(self._predictor, TorchClassifier):
            raise UsageError(
                "--distill-hidden needs the teacher's hidden states, and exports and served models do not return them",
                "give the checkpoint as --teacher",
            )
        return self._predictor

    def close(self) -> None:
        """Release connections."""
        self._predictor.close()

    def scores(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Return scores, float32 [texts, labels], in the student's order."""
        parts = [self._predictor.scores(texts[i : i + _AT_ONCE]) for i in range(0, len(texts), _AT_ONCE)]
        found: NDArray[np.float32] = np.concatenate(parts)[:, self._order]
        return found


def hidden_teacher(
    teacher: TorchClassifier, student: TorchClassifier, texts: Sequence[str], kept: Sequence[int] = (), depth: int = 0
) -> HiddenTeacher:
    """Return the teacher of hidden states. ``texts`` are samples to compare both models' tokens on.

    Raises UsageError for models that cannot be compared token by token.
    """
    limit = max_tokens(teacher.tokenizer, teacher.model.config)
    if limit < student.task.max_length:
        raise UsageError(
            f"--distill-hidden: the teacher reads {limit} tokens, and the student {student.task.max_length}",
            f"give --max-length {limit}",
        )
    as_student = dataclasses.replace(teacher.task, max_length=student.task.max_length)
    encoded = student.encode(texts)
    if (
        teacher.task.pad_left != student.task.pad_left
        or TorchClassifier(None, teacher.tokenizer, as_student).encode(texts).ids != encoded.ids
        or (student.task.pair and teacher.task.token_types and not student.task.token_types)
    ):
        raise UsageError(
            "--distill-hidden: teacher and student have different tokenizers, but are compared token by token",
            "give two checkpoints with the same tokenizer, or leave it out",
        )
    inputs = {"input_ids": torch.tensor([encoded.ids[0]]), "attention_mask": torch.ones(1, len(encoded.ids[0]))}
    types = teacher.task.token_types
    return HiddenTeacher(teacher.model, student.model, inputs, takes_types=types, kept=kept, depth=depth)
