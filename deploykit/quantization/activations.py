"""Run rows through an fp32 graph and observe the inputs of its linear layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray

from deploykit.quantization.calibration import Observe, equal_length_rows
from deploykit.quantization.onnx_files import is_large, remove_graph, save_with_weights
from deploykit.quantization.qdq import linear_layers


def show_activations(
    graph: Path,
    token_ids: Sequence[Sequence[int]],
    observe: Observe,
    token_types: Sequence[Sequence[int]] | None = None,
) -> None:
    """Run tokenized rows, unpadded, through the fp32 ``graph``, and call ``observe`` with the inputs of linear layers.

    Only inputs with a row for each token are observed. ``token_types`` are for graphs with token type ids.
    """
    session, names = _session_with_activations(graph)
    for rows in equal_length_rows(token_ids):
        input_ids = np.array([token_ids[row] for row in rows], np.int64)
        inputs = {"input_ids": input_ids, "attention_mask": np.ones_like(input_ids)}
        if token_types is not None:
            inputs["token_type_ids"] = np.array([token_types[row] for row in rows], np.int64)
        for name, values in _activations(session, names, inputs):
            observe(name, values)


def _session_with_activations(graph: Path) -> tuple[ort.InferenceSession, list[str]]:
    model = onnx.load(graph)
    names = sorted({layer.activation for layer in linear_layers(model)})
    for name in names:
        model.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    options = ort.SessionOptions()
    options.log_severity_level = 3
    provider = ["CPUExecutionProvider"]
    if not is_large(model):
        return ort.InferenceSession(model.SerializeToString(), options, providers=provider), names
    temporary = graph.with_name("activations.onnx")
    save_with_weights(model, temporary)
    session = ort.InferenceSession(str(temporary), options, providers=provider)
    remove_graph(temporary)
    return session, names


def _activations(
    session: ort.InferenceSession, names: Sequence[str], inputs: Mapping[str, NDArray[np.int64]]
) -> Iterator[tuple[str, NDArray[np.float32]]]:
    rows, length = inputs["input_ids"].shape
    for name, values in zip(names, session.run(list(names), dict(inputs))):
        if values.size // values.shape[-1] == rows * length and (values.ndim > 2 or length > 1):
            yield name, values
