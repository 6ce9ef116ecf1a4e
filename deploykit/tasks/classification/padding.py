"""Find the side on which padding does not change a classifier's answers."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np

from deploykit.runtime.batching import Batch
from deploykit.tasks.classification.facts import as_text
from deploykit.tasks.classification.predictor import graph_inputs
from deploykit.training.padding import padded

if TYPE_CHECKING:
    from deploykit.tasks.classification.checkpoint import TorchClassifier

TEXTS = ("good", "The quick brown fox jumps over the lazy dog, and 3 more words.")
_TOLERANCE = 1e-3


def pads_left(classifier: TorchClassifier) -> bool | None:
    """Return True if only padding ``TEXTS`` on the left keeps their answers, and False if padding on the right does.

    The left side is tried only if the checkpoint's tokenizer pads there. Returns None if neither side keeps the answers.
    """
    task = classifier.task
    texts = [as_text(text, text) if task.pair else text for text in TEXTS]
    encoded = classifier.encode(texts)
    alone = np.concatenate([classifier.logits_alone(text) for text in texts])
    for left in (False, True) if classifier.tokenizer.padding_side == "left" else (False,):
        ids, mask = padded(encoded.ids, task.pad_token_id, left=left)
        batch = Batch(np.arange(len(texts)), ids.numpy(), mask.numpy())
        together = classifier.logits(graph_inputs(dataclasses.replace(task, pad_left=left), encoded, batch))
        if same_answers(alone, together):
            return left
    return None


def same_answers(expected: Any, actual: Any) -> bool:
    """Return whether logits are equal apart from rounding."""
    return bool(np.abs(expected - actual).max() <= _TOLERANCE * max(1.0, float(np.abs(expected).max())))
