"""Write explicit INT8: Q/DQ graphs for each target, from one calibration.

Only linear layers (MatMul and Gemm with a constant weight) are quantized. Activations are static and per tensor, so
that a row's answer does not depend on its batch. Weights are symmetric, per output channel. Embedding tables become
INT8 with one scale per row; ONNX Runtime's quantize_static gives a table one scale.

Source: ONNX operator specification, QuantizeLinear/DequantizeLinear (opset 13 and later).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

Scheme = Literal["s8s8", "u8s8"]
"""Types of activations and weights. ``s8s8`` (symmetric) is for OpenVINO and TensorRT; ``u8s8`` is for ONNX Runtime,
which has fast CPU kernels only for it.
"""

Ranges = Mapping[str, tuple[float, float]]
"""Name of a linear layer's input -> (low, high) in real units. A layer whose input has no range stays unquantized."""

MIN_EMBEDDING_ROWS = 1024  # smaller tables are not worth quantizing


@dataclass(frozen=True)
class LinearLayer:
    """A MatMul or Gemm whose second input is constant; ``transposed`` weights are [out, in]."""

    node: str
    activation: str
    weight: str
    transposed: bool


@dataclass(frozen=True)
class QuantizedCount:
    """Number of layers and tables quantized in a graph."""

    linear_layers: int
    quantize_nodes: int
    dequantize_nodes: int
    embeddings: int


def linear_layers(model: onnx.ModelProto) -> list[LinearLayer]:
    """List the quantizable layers of ``model`` in graph order."""
    constants = {i.name: len(i.dims) for i in model.graph.initializer}
    found = []
    for node in model.graph.node:
        if node.op_type not in ("MatMul", "Gemm") or len(node.input) < 2:
            continue
        activation, weight = node.input[0], node.input[1]
        if constants.get(weight) != 2 or activation in constants:
            continue
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        if attributes.get("transA", 0) or attributes.get("alpha", 1) != 1 or attributes.get("beta", 1) != 1:
            continue
        found.append(LinearLayer(node.output[0], activation, weight, bool(attributes.get("transB", 0))))
    return found


def quantize(
    model: onnx.ModelProto, ranges: Ranges, scheme: Scheme, *, embeddings: bool = True
) -> tuple[onnx.ModelProto, QuantizedCount]:
    """Insert Q/DQ around every linear layer whose activation has a range.

    Args:
        model: fp32 graph, or fp16 (opset 19 or later, because scales have the type of the weights).
        ranges: by the name of the activation's tensor.
        scheme: types of activations and weights.
        embeddings: also store tables in INT8. TensorRT accepts INT8 constants for Q/DQ only.
    """
    quantized = onnx.ModelProto()
    quantized.CopyFrom(model)
    graph = quantized.graph
    layers = {layer.node: layer for layer in linear_layers(quantized) if layer.activation in ranges}
    weights = {i.name: i for i in graph.initializer}
    uses = Counter((layer.weight, layer.transposed) for layer in layers.values())

    dequantized: dict[str, str] = {}
    done_weights: dict[tuple[str, bool], str] = {}
    nodes: list[onnx.NodeProto] = []
    quantize_nodes = dequantize_nodes = 0
    for node in graph.node:
        layer = layers.get(node.output[0])
        if layer is not None:
            kind = helper.tensor_dtype_to_np_dtype(weights[layer.weight].data_type)
            if layer.activation not in dequantized:
                low, high = ranges[layer.activation]
                nodes += _activation_qdq(graph, layer.activation, low, high, scheme, kind)
                dequantized[layer.activation] = f"{layer.activation}/dq"
                quantize_nodes += 1
                dequantize_nodes += 1
            key = (layer.weight, layer.transposed)
            if key not in done_weights:
                weight = numpy_helper.to_array(weights[layer.weight])
                weight = weight.T if layer.transposed else weight
                # For CPUs without VNNI, ONNX Runtime makes S8 weights U8, and fails over one that two layers share.
                unsigned = scheme == "u8s8" and uses[key] > 1
                nodes.append(_weight_dq(graph, layer.weight, weight.astype(np.float32), kind, unsigned=unsigned))
                done_weights[key] = nodes[-1].output[0]
                dequantize_nodes += 1
            nodes += _matmul(node, dequantized[layer.activation], done_weights[key])
            continue
        nodes.append(node)
    tables = 0
    if embeddings:
        nodes, tables = _quantize_embeddings(graph, nodes, weights)
    del graph.node[:]
    graph.node.extend(nodes)
    drop_unused_initializers(graph)
    return quantized, QuantizedCount(len(layers), quantize_nodes, dequantize_nodes, tables)


def activation_parameters(low: float, high: float, scheme: Scheme) -> tuple[np.float32, np.int8 | np.uint8]:
    """Return scale and zero point of an activation range. Zero is always representable."""
    low, high = min(low, 0.0), max(high, 0.0)
    if scheme == "s8s8":
        return np.float32(max(-low, high, 1e-8) / 127.0), np.int8(0)
    if low == -high:  # use the same steps as S8, so that ranges of QAT fit both schemes
        return np.float32(max(high, 1e-8) / 127.0), np.uint8(128)
    scale = np.float32(max(high - low, 1e-8) / 255.0)
    return scale, np.uint8(np.clip(round(-low / float(scale)), 0, 255))


def quantize_weight(weight: NDArray[np.float32], axis: int) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Quantize a 2-D weight to symmetric INT8, with one scale for each index of ``axis``."""
    amax = np.abs(weight).max(axis=1 - axis, keepdims=True)
    scale = np.maximum(amax, 1e-12).astype(np.float32) / np.float32(127.0)
    return np.clip(np.rint(weight / scale), -127, 127).astype(np.int8), scale.reshape(-1)


def _activation_qdq(
    graph: onnx.GraphProto, name: str, low: float, high: float, scheme: Scheme, kind: np.dtype[Any]
) -> list[onnx.NodeProto]:
    scale, zero_point = activation_parameters(low, high, scheme)
    graph.initializer.append(numpy_helper.from_array(_as_scale(np.asarray(scale), kind), f"{name}/scale"))
    graph.initializer.append(numpy_helper.from_array(np.asarray(zero_point), f"{name}/zero_point"))
    parameters = [f"{name}/scale", f"{name}/zero_point"]
    return [
        helper.make_node("QuantizeLinear", [name, *parameters], [f"{name}/q"], f"{name}/QuantizeLinear"),
        helper.make_node("DequantizeLinear", [f"{name}/q", *parameters], [f"{name}/dq"], f"{name}/DequantizeLinear"),
    ]


def _as_scale(scale: NDArray[np.float32], kind: np.dtype[Any]) -> NDArray[Any]:
    """Convert a scale to the graph's type, without becoming 0."""
    return np.maximum(scale, np.finfo(kind).tiny).astype(kind)


def _weight_dq(
    graph: onnx.GraphProto, name: str, weight: NDArray[np.float32], kind: np.dtype[Any], *, unsigned: bool
) -> onnx.NodeProto:
    """Store a weight [in, out] in INT8, with a scale for each output channel (axis 1); ``unsigned``: as U8, 128 for 0."""
    values, scale = quantize_weight(weight, axis=1)
    stored, zero = (
        ((values.astype(np.int16) + 128).astype(np.uint8), np.uint8(128)) if unsigned else (values, np.int8(0))
    )
    graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(stored), f"{name}/q"))
    graph.initializer.append(numpy_helper.from_array(_as_scale(scale, kind), f"{name}/scale"))
    graph.initializer.append(numpy_helper.from_array(np.full(len(scale), zero), f"{name}/zero_point"))
    inputs = [f"{name}/q", f"{name}/scale", f"{name}/zero_point"]
    return helper.make_node("DequantizeLinear", inputs, [f"{name}/dq"], f"{name}/DequantizeLinear", axis=1)


def _matmul(node: onnx.NodeProto, activation: str, weight: str) -> list[onnx.NodeProto]:
    """Return a MatMul for any linear layer: ONNX Runtime has no INT8 kernel for a Gemm with fp32 output."""
    if node.op_type == "MatMul" or len(node.input) < 3 or not node.input[2]:
        return [helper.make_node("MatMul", [activation, weight], [node.output[0]], node.name)]
    product = f"{node.output[0]}/product"
    return [
        helper.make_node("MatMul", [activation, weight], [product], node.name),
        helper.make_node("Add", [product, node.input[2]], [node.output[0]], f"{node.name}/bias"),
    ]


def _quantize_embeddings(
    graph: onnx.GraphProto, nodes: list[onnx.NodeProto], weights: Mapping[str, onnx.TensorProto]
) -> tuple[list[onnx.NodeProto], int]:
    """Replace lookups of fp32 rows by lookups of INT8 rows and their scales.

    They are written as Gather, Cast, Mul and not as a DequantizeLinear of the table, which engines fold back into an
    fp32 table when they load the graph.
    """
    result: list[onnx.NodeProto] = []
    tables: set[str] = set()
    for node in nodes:
        table = weights.get(node.input[0]) if node.op_type == "Gather" else None
        axis = next((a.i for a in node.attribute if a.name == "axis"), 0)
        if (
            table is None
            or axis != 0
            or len(table.dims) != 2
            or table.dims[0] < MIN_EMBEDDING_ROWS
            or table.data_type != TensorProto.FLOAT
        ):
            result.append(node)
            continue
        name, out = table.name, node.output[0]
        if name not in tables:
            values, scale = quantize_weight(numpy_helper.to_array(table), axis=0)
            graph.initializer.append(numpy_helper.from_array(values, f"{name}/q"))
            graph.initializer.append(numpy_helper.from_array(scale.reshape(-1, 1), f"{name}/scale"))
            tables.add(name)
        result += [
            helper.make_node("Gather", [f"{name}/q", node.input[1]], [f"{out}/rows"], f"{out}/rows"),
            helper.make_node("Gather", [f"{name}/scale", node.input[1]], [f"{out}/row_scales"], f"{out}/row_scales"),
            helper.make_node("Cast", [f"{out}/rows"], [f"{out}/cast"], f"{out}/cast", to=TensorProto.FLOAT),
            helper.make_node("Mul", [f"{out}/cast", f"{out}/row_scales"], [out], f"{out}/scaled"),
        ]
    return result, len(tables)


def drop_unused_initializers(graph: onnx.GraphProto) -> None:
    """Remove the constants that no node reads."""
    used = {name for node in graph.node for name in node.input} | {o.name for o in graph.output}
    kept = [i for i in graph.initializer if i.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)
