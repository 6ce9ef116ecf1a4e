"""Refuse a model that could not be served, before it is trained."""

from __future__ import annotations

import copy
import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import torch

from deploykit.artifacts import explained
from deploykit.errors import ExportError, UsageError
from deploykit.graphs.encoder_export import engines_for
from deploykit.graphs.onnx_export import export_classifier
from deploykit.quantization.encoder import GRAPH
from deploykit.runtime.batching import batches
from deploykit.runtime.engines import load_engine
from deploykit.tasks.classification.checkpoint import (
    ANOTHER_MODEL,
    TorchClassifier,
    reason_of,
    tried,
)
from deploykit.tasks.classification.facts import as_text
from deploykit.tasks.classification.padding import TEXTS, same_answers
from deploykit.tasks.classification.predictor import graph_inputs
from deploykit.training.checkpoint import check_vocabulary

_LONG = " ".join(f"{TEXTS[1]} {i}" for i in range(20))
_LONGEST = 96  # longest text that the graph is tried with: longer texts take seconds, and find no other faults


def trainable(classifier: TorchClassifier, origin: str) -> TorchClassifier:
    """Try the classifier, and return it with ``token_types`` and ``pad_left`` in its facts, if its model needs them.

    The model is run on texts of two lengths, alone and padded to one batch; then a small copy of it as a graph, on each
    engine, at those lengths and a longer one. Raises UsageError naming the model's type when it does not run, when padding
    changes its answers, or when a graph does not give its answers.
    """
    model = classifier.model
    check_vocabulary(model, classifier.tokenizer, origin)
    training = model.training
    model.eval()
    classifier = tried(classifier, origin)
    try:
        _check_graph(classifier)
    except ExportError as error:
        kind = f"{origin}: models of type {model.config.model_type}"
        raise UsageError(f"{kind} cannot be exported: {error.message}", ANOTHER_MODEL) from error
    model.train(training)
    return classifier


def _check_graph(classifier: TorchClassifier) -> None:
    """Raise ExportError when the graph of a small copy does not run on an engine, or does not give PyTorch's answers."""
    task = dataclasses.replace(classifier.task, max_length=min(classifier.task.max_length, _LONGEST))
    small = TorchClassifier(_small_copy(classifier.model), classifier.tokenizer, task)
    encoded = small.encode([as_text(text, text) if task.pair else text for text in (*TEXTS, _LONG)])
    with tempfile.TemporaryDirectory() as folder, explained(Path(folder)):
        path = Path(folder) / GRAPH
        export_classifier(small.model, path, task.inputs)
        for name in engines_for("fp32"):
            try:
                engine = load_engine(name, path, 1)
                for batch in batches(
                    encoded.ids, task.pad_token_id, max_length=task.max_length, pad_left=task.pad_left
                ):
                    inputs = graph_inputs(task, encoded, batch)
                    expected, actual = small.logits(inputs), engine.run(inputs)[0]
                    if not same_answers(expected, actual):
                        raise ExportError(f"its graph gives other answers than PyTorch on {name}", "")
            except ExportError:
                raise
            except Exception as error:  # engines' exceptions have no common base
                reason = reason_of(error).replace(f"{path}: ", "")
                raise ExportError(f"its graph does not run on {name}: {reason}", "") from error


def _small_copy(model: Any) -> Any:
    """Return a model of the same architecture with two layers and random weights; the model itself if it has no such copy."""
    config = copy.deepcopy(model.config)
    try:
        config.num_hidden_layers = 2
        with torch.random.fork_rng():
            small = type(model)(config)
    except Exception:  # a configuration that lists its layers, say
        return model
    small.set_attn_implementation("eager")
    return small.eval()
