"""Encoder and decoder-step graphs of an encoder-decoder transformer, written node by node for ONNX Runtime.

The encoder gives every decoder layer's cross-attention keys and values at once. The decoder takes
one token of each row, whose past lies in buffers that it appends to in place: rows may be at
different positions, and no padding is ever computed. Both share one copy of the embedding.

GroupQueryAttention is what makes that possible in the decoder: each row attends to its own length alone, so its
result depends on nothing else in the batch, bit for bit. Cross-attention uses it too: the last source
position is handed over as the "new" key and value, and written where it already stands.

Source: ONNX Runtime, ContribOperators.md.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from deploykit.errors import ExportError
from deploykit.export.architecture import (
    Architecture,
    Array,
    Attention,
    FeedForward,
    Linear,
    Norm,
    RelativeBias,
)
from deploykit.export.quantize import Ranges, activation_parameters, quantize_weight
from deploykit.runtime.engines import TRANSLATION_FILES, Precision

OPSET = 17
_CONTRIB = "com.microsoft"
_SHARED_ALIGNMENT = 4096  # ONNX Runtime maps external data by pages
_ACTIVATIONS: Mapping[str, tuple[str, str, dict[str, Any]]] = {
    "relu": ("Relu", "", {}),
    "swish": ("QuickGelu", _CONTRIB, {"alpha": 1.0}),
    "silu": ("QuickGelu", _CONTRIB, {"alpha": 1.0}),
    "gelu": ("Gelu", _CONTRIB, {}),
    "gelu_new": ("FastGelu", _CONTRIB, {}),
    "gelu_pytorch_tanh": ("FastGelu", _CONTRIB, {}),
    "gelu_fast": ("FastGelu", _CONTRIB, {}),
}


@dataclass(frozen=True)
class Graph:
    """``activations``: name of each linear layer -> the tensor that goes into it."""

    model: onnx.ModelProto
    activations: Mapping[str, str]


def build_encoder(architecture: Architecture, ranges: Ranges | None = None) -> Graph:
    """input_ids int64 [batch, source], lengths int32 [batch] (tokens of each row; the rest is padding) ->
    cross float32 [batch, source, 2 x decoder layers x heads x head size], keys and values of each layer in turn.

    With ``ranges`` (INT8; by the linear layer's name) linear layers take U8 activations of fixed scale and S8 weights of a scale per channel.
    """
    a, g = architecture, _Writer("encoder", ranges)
    ids = g.input("input_ids", TensorProto.INT64, ["batch", "source"])
    lengths = g.input("lengths", TensorProto.INT32, ["batch"])
    length = g.op("Shape", ids, start=1, end=2)
    mask = g.padding_mask(lengths, length)
    hidden = g.embed(ids, a.encoder_embedding, a.embedding_scale)
    if a.encoder_positions is not None:
        zero = g.constant(np.array([0], np.int64))
        hidden = g.op("Add", hidden, g.op("Slice", g.constant(a.encoder_positions), zero, length, zero))
    if a.encoder_embedding_norm is not None:
        hidden = g.norm(hidden, a.encoder_embedding_norm)
    bias = g.encoder_bias(a.encoder_bias, length) if a.encoder_bias is not None else ""

    def self_attention(name: str, part: Attention) -> Callable[[str], str]:
        def block(x: str) -> str:
            packed = g.linear(x, _side_by_side(part.query, part.key, part.value), f"{name}.qkv")
            attended = g.encoder_attention(packed, mask, bias, heads=a.encoder_heads, scale=a.encoder_scale)
            return g.linear(attended, part.out, f"{name}.out")

        return block

    blocks = []
    for i, layer in enumerate(a.encoder_layers):
        blocks.append((self_attention(f"encoder.{i}.self", layer.attention), layer.attention_norm))
        blocks.append((g.feed_forward(f"encoder.{i}.feed_forward", layer.feed_forward), layer.feed_forward_norm))
    hidden = g.residual(hidden, blocks, a.encoder_norm, pre_norm=a.pre_norm)

    parts = [part for layer in a.decoder_layers for part in (layer.cross.key, layer.cross.value)]
    g.linear(hidden, _side_by_side(*parts), "cross", output="cross")
    g.output("cross", ["batch", "source", len(parts) * a.heads * a.head_size])
    return g.finish()


def build_decoder(architecture: Architecture, ranges: Ranges | None = None) -> Graph:
    """One step of the decoder.

    Inputs: input_ids int64 [rows, 1]; past_lengths int32 [rows]; total int32 [], the size of the past
    buffers in use; past.L.key and past.L.value float32 [rows, heads, total or more, head size];
    cross.L.key and .value, of the encoder's output; cross.L.last_key and .last_value float32
    [rows, 1, heads x head size], those of each row's last source token; source_last int32 [rows], its
    position; source_total int32 []. Outputs: logits float32 [rows, vocabulary]; present.L.key and
    .value, to be bound to the past buffers themselves.
    """
    a, g = architecture, _Writer("decoder", ranges)
    ids = g.input("input_ids", TensorProto.INT64, ["rows", 1])
    past = g.input("past_lengths", TensorProto.INT32, ["rows"])
    total = g.input("total", TensorProto.INT32, [])
    source_last = g.input("source_last", TensorProto.INT32, ["rows"])
    source_total = g.input("source_total", TensorProto.INT32, [])
    hidden = g.embed(ids, a.decoder_embedding, a.embedding_scale)
    if a.decoder_positions is not None:
        one = g.constant(np.array([1], np.int64))
        at = g.op("Unsqueeze", past, one)
        hidden = g.op("Add", hidden, g.op("Gather", g.constant(a.decoder_positions), at))
    if a.decoder_embedding_norm is not None:
        hidden = g.norm(hidden, a.decoder_embedding_norm)
    bias = g.decoder_bias(a.decoder_bias, past, total) if a.decoder_bias is not None else ""
    width = a.heads * a.head_size

    def cache(name: str, length: str) -> tuple[str, str]:
        dims: list[int | str] = ["rows", a.heads, length, a.head_size]
        key, value = (g.input(f"{name}.{part}", TensorProto.FLOAT, dims) for part in ("key", "value"))
        return key, value

    def self_attention(i: int, part: Attention) -> Callable[[str], str]:
        def block(x: str) -> str:
            packed = g.linear(x, _side_by_side(part.query, part.key, part.value), f"decoder.{i}.self.qkv")
            attended = g.attention(
                packed, "", "", cache(f"past.{i}", "target"), past, total,
                heads=a.heads, scale=a.scale, bias=bias, present=f"present.{i}",
            )  # fmt: skip
            return g.linear(attended, part.out, f"decoder.{i}.self.out")

        return block

    def cross_attention(i: int, part: Attention) -> Callable[[str], str]:
        def block(x: str) -> str:
            query = g.linear(x, part.query, f"decoder.{i}.cross.query")
            key = g.input(f"cross.{i}.last_key", TensorProto.FLOAT, ["rows", 1, width])
            value = g.input(f"cross.{i}.last_value", TensorProto.FLOAT, ["rows", 1, width])
            attended = g.attention(
                query, key, value, cache(f"cross.{i}", "source"), source_last, source_total,
                heads=a.heads, scale=a.scale, present=f"cross_present.{i}",
            )  # fmt: skip
            return g.linear(attended, part.out, f"decoder.{i}.cross.out")

        return block

    blocks = []
    for i, layer in enumerate(a.decoder_layers):
        blocks.append((self_attention(i, layer.attention), layer.attention_norm))
        blocks.append((cross_attention(i, layer.cross), layer.cross_norm))
        blocks.append((g.feed_forward(f"decoder.{i}.feed_forward", layer.feed_forward), layer.feed_forward_norm))
    hidden = g.residual(hidden, blocks, a.decoder_norm, pre_norm=a.pre_norm)
    for i in range(len(a.decoder_layers)):
        for name, length in ((f"present.{i}", "target"), (f"cross_present.{i}", "source")):
            for part in ("key", "value"):
                g.output(f"{name}.{part}", ["rows", a.heads, length, a.head_size])
    hidden = g.op("Squeeze", hidden, g.constant(np.array([1], np.int64)))
    if a.output_scale != 1.0:
        hidden = g.op("Mul", hidden, g.constant(np.array(a.output_scale, np.float32)))
    g.project(hidden, a.projection, a.output_bias, "decoder.projection", output="logits")
    g.output("logits", ["rows", a.vocabulary])
    return g.finish()


def save_graphs(folder: Path, encoder: Graph, decoder: Graph, precision: Precision) -> None:
    """Write both graphs, and the embeddings, once, to the file beside them.

    Raises ExportError when a file would pass protobuf's limit of 2 GB.
    """
    *names, shared_name = TRANSLATION_FILES[precision]
    offsets: dict[str, tuple[int, int]] = {}
    with (folder / shared_name).open("wb") as shared:
        for graph in (encoder, decoder):
            for tensor in graph.model.graph.initializer:
                if not tensor.name.startswith("shared/"):
                    continue
                if tensor.name not in offsets:
                    shared.write(b"\0" * (-shared.tell() % _SHARED_ALIGNMENT))
                    offsets[tensor.name] = (shared.tell(), len(tensor.raw_data))
                    shared.write(tensor.raw_data)
                _make_external(tensor, shared_name, *offsets[tensor.name])
    for name, graph in zip(names, (encoder, decoder)):
        if graph.model.ByteSize() >= 2**31:
            raise ExportError(
                f"{name} would have {graph.model.ByteSize():,} bytes, more than ONNX allows", "use --int8"
            )
        onnx.save(graph.model, folder / name)


def _make_external(tensor: onnx.TensorProto, location: str, offset: int, length: int) -> None:
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", str(offset)), ("length", str(length))):
        tensor.external_data.add(key=key, value=value)


@dataclass
class _Writer:
    """Nodes in the order they are written; names of tensors are what the methods return."""

    name: str
    ranges: Ranges | None
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    initializers: dict[str, onnx.TensorProto] = field(default_factory=dict)
    inputs: list[onnx.ValueInfoProto] = field(default_factory=list)
    outputs: list[onnx.ValueInfoProto] = field(default_factory=list)
    activations: dict[str, str] = field(default_factory=dict)
    quantized: dict[str, tuple[str, str, str, float]] = field(default_factory=dict)
    count: int = 0

    def finish(self) -> Graph:
        graph = helper.make_graph(self.nodes, self.name, self.inputs, self.outputs, list(self.initializers.values()))
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(_CONTRIB, 1)]
        return Graph(helper.make_model(graph, opset_imports=opsets, ir_version=8), self.activations)

    def input(self, name: str, kind: int, shape: Sequence[int | str]) -> str:
        self.inputs.append(helper.make_tensor_value_info(name, kind, shape))
        return name

    def output(self, name: str, shape: Sequence[int | str]) -> None:
        self.outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))

    def constant(self, array: NDArray[Any], *, shared: bool = False) -> str:
        """An initializer, equal arrays once; ``shared`` ones also across graphs."""
        array = np.ascontiguousarray(array) if array.ndim else array
        name = hashlib.sha256(array.tobytes() + str((array.dtype, array.shape)).encode()).hexdigest()[:24]
        name = f"shared/{name}" if shared else f"constant/{name}"
        if name not in self.initializers:
            self.initializers[name] = numpy_helper.from_array(array, name)
        return name

    def op(self, kind: str, *inputs: str, domain: str = "", output: str = "", **attributes: Any) -> str:
        """Append a node with one output; returns its name."""
        self.count += 1
        output = output or f"t{self.count}"
        name = f"{self.name}/{kind}/{self.count}"
        self.nodes.append(helper.make_node(kind, inputs, [output], name, domain=domain, **attributes))
        return output

    def embed(self, ids: str, table: Array, scale: float) -> str:
        """Rows of the embedding, times ``scale``; an INT8 row has one scale of its own."""
        if self.ranges is None:
            rows = self.op("Gather", self.constant(table, shared=True), ids)
            return rows if scale == 1.0 else self.op("Mul", rows, self.constant(np.array(scale, np.float32)))
        values, scales = quantize_weight(table, axis=0)
        rows = self.op("Cast", self.op("Gather", self.constant(values, shared=True), ids), to=TensorProto.FLOAT)
        return self.op("Mul", rows, self.op("Gather", self.constant(scales.reshape(-1, 1) * np.float32(scale)), ids))

    def linear(self, x: str, layer: Linear, name: str, *, output: str = "") -> str:
        self.activations[name] = x
        if self.ranges is None or name not in self.ranges:
            inputs = [x, self.constant(layer.weight)]
            if layer.bias is None:
                return self.op("MatMul", *inputs, output=output)
            return self.op("Add", self.op("MatMul", *inputs), self.constant(layer.bias), output=output)
        values, scale, zero, _ = self._quantize(x, name)
        weight, scales = quantize_weight(layer.weight, axis=1)
        inputs = [values, self.constant(weight), scale, self.constant(scales), zero, ""]
        inputs += [] if layer.bias is None else [self.constant(layer.bias)]
        while not inputs[-1]:
            inputs.pop()
        return self.op("MatMulIntegerToFloat", *inputs, domain=_CONTRIB, output=output)

    def project(self, x: str, table: Array, bias: Array | None, name: str, *, output: str) -> None:
        """x @ table.T + bias, from the rows of the embedding as they are stored."""
        self.activations[name] = x
        bias = bias if bias is not None and bias.any() else None
        if self.ranges is None or name not in self.ranges:
            inputs = [x, self.constant(table, shared=True), *([] if bias is None else [self.constant(bias)])]
            self.op("Gemm", *inputs, transB=1, output=output)
            return
        values, scale, zero, step = self._quantize(x, name)
        weight, scales = quantize_weight(table, axis=0)
        inputs = [values, scale, zero, self.constant(weight, shared=True), self.constant(scales)]
        inputs.append(self.constant(np.zeros(len(scales), np.int8)))
        if bias is not None:  # in units of the product's steps: a ten-thousandth of what INT8 rounds
            inputs.append(self.constant(np.clip(np.rint(bias / (scales * step)), -(2**30), 2**30).astype(np.int32)))
        self.op("QGemm", *inputs, domain=_CONTRIB, transB=1, output=output)

    def _quantize(self, x: str, name: str) -> tuple[str, str, str, float]:
        assert self.ranges is not None
        if x not in self.quantized:
            scale, zero = activation_parameters(*self.ranges[name], "u8s8")
            parameters = self.constant(np.asarray(scale)), self.constant(np.asarray(zero))
            self.quantized[x] = (self.op("QuantizeLinear", x, *parameters), *parameters, float(scale))
        return self.quantized[x]

    def encoder_attention(self, packed: str, mask: str, bias: str, *, heads: int, scale: float) -> str:
        """Attention of each token to all that ``mask`` has; ``packed`` holds queries, keys and values."""
        self.count += 1
        parts = [f"t{self.count}.{part}" for part in ("query", "key", "value")]
        self.nodes.append(helper.make_node("Split", [packed], parts, f"{self.name}/Split/{self.count}", axis=2))
        inputs = [*parts, "", mask, *([bias] if bias else [])]
        return self.op("MultiHeadAttention", *inputs, domain=_CONTRIB, num_heads=heads, scale=scale)

    def attention(
        self, query: str, key: str, value: str, past: tuple[str, str], lengths: str, total: str, *,
        heads: int, scale: float, present: str, bias: str = "",
    ) -> str:  # fmt: skip
        """Attention of each row's one token to its own ``lengths`` + 1 positions, the last of which is its own.

        Packed queries, keys and values stand in ``query`` where ``key`` is empty. The caches ``past``
        are appended to, as ``present``.
        """
        self.count += 1
        output = f"t{self.count}"
        inputs = [query, key, value, *past, lengths, total, *(["", "", "", bias] if bias else [])]
        self.nodes.append(
            helper.make_node(
                "GroupQueryAttention", inputs, [output, f"{present}.key", f"{present}.value"],
                f"{self.name}/GroupQueryAttention/{self.count}", domain=_CONTRIB,
                num_heads=heads, kv_num_heads=heads, scale=scale,
            )
        )  # fmt: skip
        return output

    def feed_forward(self, name: str, part: FeedForward) -> Callable[[str], str]:
        if part.activation not in _ACTIVATIONS:
            raise ExportError(
                f"the activation {part.activation!r} is not supported", f"supported: {', '.join(_ACTIVATIONS)}"
            )
        kind, domain, attributes = _ACTIVATIONS[part.activation]

        def block(x: str) -> str:
            up = self.linear(x, part.up, f"{name}.up")
            if part.gate is None:
                inner = self.op(kind, up, domain=domain, **attributes)
            else:
                gate = self.op(kind, self.linear(x, part.gate, f"{name}.gate"), domain=domain, **attributes)
                inner = self.op("Mul", gate, up)
            return self.linear(inner, part.down, f"{name}.down")

        return block

    def norm(self, x: str, norm: Norm) -> str:
        gamma = self.constant(norm.gamma)
        if norm.beta is None:
            return self.op("SimplifiedLayerNormalization", x, gamma, axis=-1, epsilon=norm.epsilon)
        return self.op("LayerNormalization", x, gamma, self.constant(norm.beta), axis=-1, epsilon=norm.epsilon)

    def residual(
        self, x: str, blocks: Sequence[tuple[Callable[[str], str], Norm]], last: Norm | None, *, pre_norm: bool
    ) -> str:
        """The blocks one after another, each added to what went in; norms before or after each."""
        if not pre_norm:
            for block, norm in blocks:
                _, x = self._add_and_norm(x, block(x), norm)
            return x if last is None else self.norm(x, last)
        normalized = self.norm(x, blocks[0][1])
        assert last is not None, "every pre-norm family has one"
        for (block, _), norm in zip(blocks, [*(norm for _, norm in blocks[1:]), last]):
            x, normalized = self._add_and_norm(x, block(normalized), norm)
        return normalized

    def _add_and_norm(self, x: str, y: str, norm: Norm) -> tuple[str, str]:
        """(x + y, norm(x + y)). Two operators: ONNX Runtime's one for both is several times slower (measured in 1.31)."""
        total = self.op("Add", x, y)
        return total, self.norm(total, norm)

    def padding_mask(self, lengths: str, length: str) -> str:
        """int32 [batch, source]: 1 for tokens, 0 for padding."""
        zero, one = (self.constant(np.array(n, np.int64)) for n in (0, 1))
        positions = self.op("Cast", self.op("Range", zero, self.op("Squeeze", length), one), to=TensorProto.INT32)
        ends = self.op("Unsqueeze", lengths, self.constant(np.array([1], np.int64)))
        return self.op("Cast", self.op("Less", positions, ends), to=TensorProto.INT32)

    def encoder_bias(self, bias: RelativeBias, length: str) -> str:
        """float32 [1, heads, source, source]"""
        zero, one = (self.constant(np.array(n, np.int64)) for n in (0, 1))
        positions = self.op("Range", zero, self.op("Squeeze", length), one)
        rows = self.op("Unsqueeze", positions, self.constant(np.array([1], np.int64)))
        columns = self.op("Unsqueeze", positions, self.constant(np.array([0], np.int64)))
        return self._bias(bias, self.op("Sub", columns, rows), batch_axis=False)

    def decoder_bias(self, bias: RelativeBias, past: str, total: str) -> str:
        """float32 [rows, heads, 1, total]; keys after a row's own position are never looked at."""
        zero, one = (self.constant(np.array(n, np.int64)) for n in (0, 1))
        keys = self.op("Range", zero, self.op("Cast", total, to=TensorProto.INT64), one)
        at = self.op("Cast", self.op("Unsqueeze", past, self.constant(np.array([1], np.int64))), to=TensorProto.INT64)
        return self._bias(bias, self.op("Sub", keys, at), batch_axis=True)

    def _bias(self, bias: RelativeBias, distance: str, *, batch_axis: bool) -> str:
        last = bias.by_distance.shape[1] - 1
        index = self.op("Add", distance, self.constant(np.array(bias.zero, np.int64)))
        bounds = [self.constant(np.array(n, np.int64)) for n in (0, last)]
        index = self.op("Clip", index, *bounds)
        gathered = self.op("Gather", self.constant(bias.by_distance), index, axis=1)  # [heads, a, b]
        if not batch_axis:
            return self.op("Unsqueeze", gathered, self.constant(np.array([0], np.int64)))
        by_row = self.op("Transpose", gathered, perm=[1, 0, 2])
        return self.op("Unsqueeze", by_row, self.constant(np.array([2], np.int64)))


def _side_by_side(*layers: Linear) -> Linear:
    """Layers of one input as a single layer."""
    weight = np.concatenate([layer.weight for layer in layers], axis=1)
    if all(layer.bias is None for layer in layers):
        return Linear(weight)
    biases = [np.zeros(la.weight.shape[1], np.float32) if la.bias is None else la.bias for la in layers]
    return Linear(weight, np.concatenate(biases))


def with_activations(graph: Graph) -> Graph:
    """The same graph, which also gives every linear layer's input as an output, for calibration."""
    model = onnx.ModelProto()
    model.CopyFrom(graph.model)
    for tensor in dict.fromkeys(graph.activations.values()):
        model.graph.output.append(helper.make_tensor_value_info(tensor, TensorProto.FLOAT, None))
    return replace(graph, model=model)
