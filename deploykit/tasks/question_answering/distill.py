"""Compute the logits of a teacher, from which a student learns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from deploykit.errors import UsageError
from deploykit.runtime.served import DEFAULT_URL
from deploykit.tasks.opening import open_predictor
from deploykit.tasks.question_answering.checkpoint import TorchAnswerer
from deploykit.tasks.question_answering.facts import QuestionAnswering
from deploykit.tasks.question_answering.predictor import Answerer
from deploykit.tasks.question_answering.rows import Example
from deploykit.tasks.question_answering.windows import PairTokenizer, Window
from deploykit.tasks.registry import task_of
from deploykit.training.hidden_states import HiddenTeacher
from deploykit.training.losses import soft_targets

_PADDING = -1e4
"""Logit of positions that are no tokens."""


def open_teacher(target: str, student: TorchAnswerer, samples: Sequence[Example]) -> Answerer:
    """Open a teacher, a checkpoint or an export.

    Raises UsageError if it has no logits, or does not cut the ``samples`` into the windows of the student.
    """
    teacher: Any = open_predictor(target, url=DEFAULT_URL)
    if not isinstance(teacher.task, QuestionAnswering):
        raise UsageError(f"--teacher {target} {task_of(teacher.task).does}", "give a model that answers questions")
    if not isinstance(teacher, Answerer):
        raise UsageError(
            f"--teacher {target} is a served model, which returns answers, not the logits of all tokens",
            "give its checkpoint or its export",
        )
    if teacher.task.max_length < student.task.max_length:
        raise UsageError(
            f"--teacher {target} reads windows of {teacher.task.max_length} tokens, and the student of "
            f"{student.task.max_length}",
            f"give --max-length {teacher.task.max_length}",
        )
    theirs = teacher.tokenizer.for_task(student.task)
    if any(_windows(theirs, sample) != _windows(student.tokenizer, sample) for sample in samples):
        raise UsageError(
            f"--teacher {target} has another tokenizer than the student, but is compared token by token",
            "give a teacher and a student with the same tokenizer",
        )
    return teacher


def logits_of(teacher: Answerer, windows: Sequence[Window]) -> list[NDArray[np.float32]]:
    """Return start and end logits of each window, float32 [2, tokens]."""
    found: dict[int, NDArray[np.float32]] = {}
    for rows, start, end in teacher.logits(windows):
        for i, row in enumerate(rows.tolist()):
            found[row] = np.stack([start[i], end[i]])[:, : len(windows[row].ids)]
    return [found[row] for row in range(len(windows))]


def stacked(logits: Sequence[NDArray[np.float32]]) -> torch.Tensor:
    """Return logits of a batch, float32 [windows, 2, tokens], padded with a logit that gives no probability."""
    longest = max(each.shape[1] for each in logits)
    padded = [np.pad(each, ((0, 0), (0, longest - each.shape[1])), constant_values=_PADDING) for each in logits]
    return torch.from_numpy(np.stack(padded))


def distillation(outputs: Any, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return the summed distance of start and end logits from those of ``teacher``, as ``stacked`` returns them. Only tokens of
    the windows count."""
    ours = torch.stack([outputs["start_logits"], outputs["end_logits"]], dim=1).float()
    return soft_targets(ours.masked_fill(teacher <= _PADDING, _PADDING), teacher, temperature)


def hidden_teacher(
    teacher: Answerer, model: Any, window: Window, kept: Sequence[int] = (), depth: int = 0
) -> HiddenTeacher:
    """Return the teacher of hidden states, tried on a window. Raises UsageError for an export."""
    if not isinstance(teacher, TorchAnswerer):
        raise UsageError(
            "--distill-hidden needs the teacher's hidden states, and exports do not return them",
            "give the checkpoint as --teacher",
        )
    inputs = {"input_ids": torch.tensor([window.ids]), "attention_mask": torch.ones(1, len(window.ids))}
    return HiddenTeacher(teacher.model, model, inputs, takes_types=teacher.task.token_types, kept=kept, depth=depth)


def _windows(tokenizer: PairTokenizer, example: Example) -> list[Window]:
    return list(tokenizer.windows(tokenizer.question(example.question), tokenizer.context(example.context)))
