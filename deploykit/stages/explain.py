"""Explain a model's answers by the words of the texts, with the same steps for every task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from deploykit.attribution.explain import Differentiable, Explanation, explain
from deploykit.attribution.words import Unit
from deploykit.errors import DataError, UsageError
from deploykit.tasks.protocol import Predictor, Progress
from deploykit.tasks.registry import task_of
from deploykit.tasks.types import Explaining

METHODS = ("auto", "gradients", "occlusion")
UNITS: tuple[Unit, ...] = ("word", "sentence")
_SHOWN = 80
"""Maximum characters of a text in the reason why it is left out."""
_CHECKED = 50
"""Maximum number of explanations that are checked by deletion: a check runs the model 30 times."""


def explain_texts(
    predictor: Predictor,
    texts: Sequence[str],
    *,
    method: str = "auto",
    answer: str | None = None,
    unit: Unit = "word",
    refused: list[str] | None = None,
    progress: Progress = lambda done, of: None,
) -> list[Explanation]:
    """Explain the model's answer to each text, or the answer ``answer``.

    "gradients" are integrated gradients, of a checkpoint that classifies or generates text; "occlusion" removes one word (or
    sentence, by ``unit``) after the other, with any model; "auto" takes gradients of a classifier's checkpoint. The first 50
    explanations are checked by deletion.

    Texts that the model refuses are left out, and added to ``refused`` with the reason if that is given.

    Raises UsageError if answers of the task cannot be explained, or ``method`` or ``answer`` does not fit the model, DataError if
    the model refuses a text and there is no ``refused``.
    """
    task: Any = task_of(predictor.task)
    if not isinstance(task, Explaining):
        raise UsageError(f"answers of a model that {task.does} cannot be explained", "give a model of another task")
    for option, value, known in (("--method", method, METHODS), ("--unit", unit, UNITS)):
        if value not in known:
            raise UsageError(f"{option} is {value!r}", f"choose one of: {', '.join(known)}")
    found = []
    for number, text in enumerate(texts):
        try:
            explained = task.explained_text(predictor, text, answer, method, unit)
        except DataError as error:
            if refused is None:
                raise
            refused.append(f"{text[:_SHOWN]!r}: {error.message}")
            progress(number + 1, len(texts))
            continue
        chosen = "gradients" if isinstance(explained, Differentiable) else "occlusion"
        found.append(explain(explained, chosen, check=number < _CHECKED, seed=number))
        progress(number + 1, len(texts))
    return found
