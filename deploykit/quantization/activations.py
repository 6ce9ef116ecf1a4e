"""Run rows through an fp32 graph and observe the inputs of its linear layers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray

from deploykit.quantization.calibration import Observe, equal_length_batches
from deploykit.quantization.qdq import linear_layers


def show_activations(graph: Path, token_ids: Sequence[Sequence[int]], observe: Observe) -> None:
    """Run tokenized rows, unpadded, through the fp32 ``graph``, and call ``observe`` with the inputs of linear layers.

    Only inputs with a row for each token are observed.
    """
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
