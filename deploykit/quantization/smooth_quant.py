"""SmoothQuant: move outliers of activations, which one scale per tensor cannot represent, into the weights.

Channel j of a linear layer's input is divided by s_j, and row j of its weights is multiplied by s_j, so the function
stays the same: s_j = max|X_j|^alpha / max|W_j|^(1 - alpha). ONNX Runtime has it only through neural-compressor.

Source: Xiao et al., "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models", ICML
2023.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from deploykit.quantization.activations import show_activations
from deploykit.quantization.qdq import LinearLayer, drop_unused_initializers, linear_layers

Scales = Mapping[str, NDArray[np.float32]]
"""Name of an activation's tensor -> the divisors of its channels, float32 [channels]."""


@dataclass(frozen=True)
class SmoothedCount:
    """Number of activations whose division was folded into a norm, and of those that got a Mul."""

    folded: int
    multiplied: int


def smoothing_scales(
    graph: Path,
    token_ids: Sequence[Sequence[int]],
    alpha: float,
    token_types: Sequence[Sequence[int]] | None = None,
) -> dict[str, NDArray[np.float32]]:
    """Return the scales of each layer norm's output that linear layers of an encoder's fp32 ``graph`` read.

    ``alpha`` sets how much of the difficulty moves from activations (0: none) to weights (1: all). Channel maxima are
    those of the tokenized rows, unpadded; ``token_types`` are for graphs with token type ids. Layers with the same
    input (queries, keys, values) share their weights' maxima. A channel that is always 0, or has no weights, is left
    unchanged.
    """
    model = onnx.load(graph)
    readers = _readers_of_norms(model)
    maxima: dict[str, NDArray[np.float32]] = {}

    def widen(name: str, values: NDArray[np.float32]) -> None:
        highest = np.abs(values).reshape(-1, values.shape[-1]).max(axis=0)
        maxima[name] = np.maximum(maxima.get(name, highest), highest)

    show_activations(graph, token_ids, widen, token_types)
    weights = {i.name: i for i in model.graph.initializer}
    return {
        name: channel_scales(maxima[name], _weight_maxima(layers, weights), alpha)
        for name, layers in readers.items()
        if name in maxima
    }


def smooth(model: onnx.ModelProto, scales: Scales) -> tuple[onnx.ModelProto, SmoothedCount]:
    """Return the same function with the activations in ``scales`` divided, and named ``smoothed(activation)``.

    Where only linear layers read a norm's output, the division is folded into the norm. Where a residual connection
    reads it too (BERT's norms come after each block), a Mul is inserted before the linear layers.

    Args:
        model: fp32, or fp16 with the same tensor names.
    """
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    graph = changed.graph
    weights = {i.name: i for i in graph.initializer}
    by_output = {layer.node: layer for layer in linear_layers(changed) if layer.activation in scales}
    kinds = {
        layer.activation: helper.tensor_dtype_to_np_dtype(weights[layer.weight].data_type)
        for layer in by_output.values()
    }
    # In unfolded graphs, norms read shared parameters through an Identity.
    constant = {
        n.output[0] for n in graph.node if n.op_type == "LayerNormalization" and {*n.input[1:]} <= weights.keys()
    }
    folded = {name for name in kinds if name in constant and _only_linear_layers_read(graph, name, by_output)}
    nodes: list[onnx.NodeProto] = []

    def scaled(original: str, name: str, factor: NDArray[np.float32]) -> str:
        """Return a constant of the type of ``original``, times ``factor``."""
        array = numpy_helper.to_array(weights[original])
        graph.initializer.append(numpy_helper.from_array((array * factor).astype(array.dtype), name))
        return name

    for node in graph.node:
        layer = by_output.get(node.output[0])
        if layer is not None:
            factor = scales[layer.activation] if layer.transposed else scales[layer.activation][:, None]
            node.input[1] = scaled(layer.weight, f"{layer.node}/smoothed_weight", factor)
        for i, name in enumerate(node.input):
            if name in folded or (layer is not None and i == 0):
                node.input[i] = smoothed(name)
        nodes.append(node)
        name = node.output[0]
        if name in folded:
            for i in range(1, len(node.input)):
                node.input[i] = scaled(node.input[i], f"{smoothed(name)}/{i}", 1 / scales[name])
            node.output[0] = smoothed(name)
        elif name in kinds:
            divisor = numpy_helper.from_array((1 / scales[name]).astype(kinds[name]), f"{smoothed(name)}/1")
            graph.initializer.append(divisor)
            nodes.append(helper.make_node("Mul", [name, divisor.name], [smoothed(name)], smoothed(name)))
    del graph.node[:]
    graph.node.extend(nodes)
    drop_unused_initializers(graph)
    return changed, SmoothedCount(len(folded), len(kinds) - len(folded))


def smoothed(activation: str) -> str:
    """Return the name of an activation's tensor after division."""
    return f"{activation}/smoothed"


def _readers_of_norms(model: onnx.ModelProto) -> dict[str, list[LinearLayer]]:
    """Return the linear layers that read each layer norm's output, for norms over the last axis."""
    vectors = {i.name for i in model.graph.initializer if len(i.dims) == 1}
    norms = {
        node.output[0]
        for node in model.graph.node
        if node.op_type == "LayerNormalization" and vectors.issuperset(node.input[1:])
    }
    readers: dict[str, list[LinearLayer]] = defaultdict(list)
    for layer in linear_layers(model):
        if layer.activation in norms:
            readers[layer.activation].append(layer)
    return readers


def _only_linear_layers_read(graph: onnx.GraphProto, activation: str, layers: Collection[str]) -> bool:
    """Return whether only ``layers``, named by their outputs, read the values of ``activation``. Shape reads no
    values."""
    reads = [node for node in graph.node if activation in node.input and node.op_type != "Shape"]
    return all(node.output[0] in layers for node in reads) and activation not in {o.name for o in graph.output}


def _weight_maxima(layers: Sequence[LinearLayer], weights: Mapping[str, onnx.TensorProto]) -> NDArray[np.float32]:
    """Return the largest magnitude of each input channel over all ``layers``, float32 [channels]."""
    maxima = [
        np.abs(numpy_helper.to_array(weights[layer.weight])).max(axis=0 if layer.transposed else 1) for layer in layers
    ]
    return np.asarray(np.max(maxima, axis=0), np.float32)


def channel_scales(activation: NDArray[np.float32], weight: NDArray[np.float32], alpha: float) -> NDArray[np.float32]:
    """Return the divisors of channels, float32 [channels], from the largest magnitudes of activation and weights."""
    live = (activation > 0) & (weight > 0)
    scales = np.ones_like(activation)
    scales[live] = activation[live] ** alpha / weight[live] ** (1 - alpha)
    return scales
