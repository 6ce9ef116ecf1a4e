"""Calibration of a classifier: what goes into its linear layers while fp32 answers real rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray

from deploykit.artifacts import digest_of
from deploykit.export.calibration import Calibration, Observe, collect, equal_length_batches
from deploykit.export.quantize import linear_layers
from deploykit.runtime.engines import ENGINES
from deploykit.runtime.text import normalize
from deploykit.runtime.tokenizer import TextTokenizer
from deploykit.tasks import Classification

_GRAPH = ENGINES["onnxruntime"].graphs["fp32"]


def activations_of(folder: Path) -> set[str]:
    """The tensors that go into linear layers of the fp32 graph."""
    return {layer.activation for layer in linear_layers(onnx.load(folder / _GRAPH))}


def calibrate(folder: Path, task: Classification, texts: Sequence[str], graph: str = _GRAPH) -> Calibration:
    """Run ``texts`` through an fp32 ``graph`` in ``folder``."""
    return calibrate_tokens(folder / graph, tokenized(folder, task, texts), digest_of(list(texts)))


def tokenized(folder: Path, task: Classification, texts: Sequence[str]) -> list[list[int]]:
    """The token ids of ``texts`` as the export in ``folder`` is served them."""
    return TextTokenizer(folder / "tokenizer.json", task.max_length).encode([normalize(text) for text in texts])


def calibrate_tokens(graph: Path, token_ids: Sequence[Sequence[int]], rows_digest: str) -> Calibration:
    """Run tokenized rows, unpadded, through the fp32 ``graph`` and collect its quantizable activations.

    Only activations with a row for each token count: what comes after pooling is a single row a
    text, costs nothing in fp32, and decides the answer.
    """
    return collect(lambda observe: show_activations(graph, token_ids, observe), len(token_ids), rows_digest)


def show_activations(graph: Path, token_ids: Sequence[Sequence[int]], observe: Observe) -> None:
    """Run tokenized rows, unpadded, through the fp32 ``graph`` and show ``observe`` what goes into its linear layers,
    where that has a row for each token."""
    session, names = _session_with_activations(graph)
    for batch in equal_length_batches(token_ids):
        for name, values in _activations(session, names, batch):
            observe(name, values)


def _session_with_activations(graph: Path) -> tuple[ort.InferenceSession, list[str]]:
    model = onnx.load(graph)
    names = sorted({layer.activation for layer in linear_layers(model)})
    for name in names:
        model.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    options = ort.SessionOptions()
    options.log_severity_level = 3
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"]), names


def _activations(
    session: ort.InferenceSession, names: Sequence[str], input_ids: NDArray[np.int64]
) -> Iterator[tuple[str, NDArray[np.float32]]]:
    inputs = {"input_ids": input_ids, "attention_mask": np.ones_like(input_ids)}
    tokens = input_ids.size
    for name, values in zip(names, session.run(list(names), inputs)):
        if values.size // values.shape[-1] == tokens and (values.ndim > 2 or input_ids.shape[1] > 1):
            yield name, values
