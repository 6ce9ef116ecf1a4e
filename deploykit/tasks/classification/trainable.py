"""Refuse, before it is trained, a model that could not be served afterwards."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from deploykit.errors import ExportError, UsageError
from deploykit.graphs.onnx_export import export_classifier
from deploykit.tasks.classification.checkpoint import TorchClassifier

_TEXTS = ("a", "The quick brown fox jumps over the lazy dog, and 3 more words.")
_TOLERANCE = 1e-3


def check_trainable(classifier: TorchClassifier, origin: str) -> None:
    """Run a model on texts of two lengths, alone and padded to one batch, and trace a small copy of it to ONNX.

    Raises UsageError naming the model's type when it does not run, when padding changes its answers, or when it has no
    ONNX graph.
    """
    kind = f"{origin}: models of type {classifier.model.config.model_type}"
    remedy = "start from another model; docs: Fine-tune, architectures"
    training = classifier.model.training
    classifier.model.eval()
    try:
        together = classifier.scores(_TEXTS)
        alone = np.concatenate([classifier.scores_alone(text) for text in _TEXTS])
    except Exception as error:  # whatever the architecture raises, it cannot classify texts like these
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise UsageError(f"{kind} do not run on a short text: {first}", remedy) from error
    if not np.abs(together - alone).max() <= _TOLERANCE:
        raise UsageError(f"{kind} answer otherwise when a text is padded, so they cannot be served in batches", remedy)
    try:
        with tempfile.TemporaryDirectory() as folder:
            export_classifier(_small_copy(classifier.model), Path(folder) / "model.onnx")
    except ExportError as error:
        raise UsageError(f"{kind} cannot be exported: {error.message}", remedy) from error
    classifier.model.train(training)


def _small_copy(model: Any) -> Any:
    """Return a model of the same architecture with two layers and random weights; the model itself if it has no such copy."""
    config = copy.deepcopy(model.config)
    try:
        config.num_hidden_layers = 2
        small = type(model)(config)
    except Exception:  # a configuration that lists its layers, say
        return model
    small.set_attn_implementation("eager")
    return small
