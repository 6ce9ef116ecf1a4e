"""Write a transformer's ONNX nodes one by one: the part common to all runtimes.

Subclasses (``onnxruntime_writer``, ``standard_writer``) write attention, activations and INT8 for their runtime.
torch.onnx writes the operations of transformers' modules: neither contrib operators nor caches that a step writes to in place.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from deploykit.errors import ExportError
from deploykit.graphs.architecture import Architecture, Array, FeedForward, Linear, Norm, RelativeBias
from deploykit.quantization.qdq import Ranges

ACTIVATIONS = "deploykit.activations"
"""Key of a graph's metadata with ``Graph.activations``, as JSON."""

# Hugging Face's name of an activation -> the name in the writers
_ACTIVATIONS: Mapping[str, str] = {
    "relu": "relu",
    "swish": "silu",
    "silu": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu by tanh",
    "gelu_pytorch_tanh": "gelu by tanh",
    "gelu_fast": "gelu by tanh",
}


def activation_of(name: str) -> str:
    """Return the writers' name of a Hugging Face activation. Raises ExportError if it is not supported."""
    if name not in _ACTIVATIONS:
        raise ExportError(f"the activation {name!r} is not supported", f"supported: {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


@dataclass(frozen=True)
class Graph:
    """A model; ``activations`` maps the name of each linear layer to its input tensor."""

    model: onnx.ModelProto
    activations: Mapping[str, str]


@dataclass
class Writer(ABC):
    """A builder that collects nodes in the order they are written. Methods return names of tensors.

    ``ranges`` are of the linear layers to write in INT8, by name; with None the embedding stays unquantized too.
    ``kind`` is the type that the graph computes in.
    """

    name: str
    architecture: Architecture
    ranges: Ranges | None
    kind: int = TensorProto.FLOAT
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    initializers: dict[str, onnx.TensorProto] = field(default_factory=dict)
    inputs: list[onnx.ValueInfoProto] = field(default_factory=list)
    outputs: list[onnx.ValueInfoProto] = field(default_factory=list)
    activations: dict[str, str] = field(default_factory=dict)
    written: dict[str, str] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    count: int = 0

    @abstractmethod
    def finish(self) -> Graph: ...

    @abstractmethod
    def padding_mask(self, lengths: str, length: str) -> str:
        """Return the mask that ``encoder_attention`` takes, for rows of ``lengths`` tokens padded to ``length``."""

    @abstractmethod
    def encoder_attention(self, packed: str, mask: str, bias: str) -> str:
        """Let each token attend to all tokens in ``mask``. ``packed`` contains queries, keys and values."""

    @abstractmethod
    def begin_decoder(self) -> str:
        """Declare the inputs that decoder attention needs once. Returns the positions of the past caches in use, a
        scalar.

        Its type is int32 or int64.
        """

    @abstractmethod
    def self_attention(self, packed: str, layer: int, past: str, total: str, bias: str) -> str:
        """Let one token per row attend to its ``past`` cache positions and itself, and append it to the caches.

        ``packed`` contains query, key and value.
        """

    @abstractmethod
    def cross_attention(self, query: str, layer: int, source_last: str) -> str:
        """Let one token per row attend to its text, whose last token is at ``source_last``."""

    @abstractmethod
    def activation(self, name: str, x: str) -> str:
        """Apply an activation; ``name`` is one of the values of ``_ACTIVATIONS``."""

    @abstractmethod
    def root_mean_square_norm(self, x: str, gamma: str, epsilon: float) -> str: ...

    def model(self, opsets: Mapping[str, int], ir_version: int) -> onnx.ModelProto:
        graph = helper.make_graph(self.nodes, self.name, self.inputs, self.outputs, list(self.initializers.values()))
        imports = [helper.make_opsetid(domain, version) for domain, version in opsets.items()]
        model = helper.make_model(graph, opset_imports=imports, ir_version=ir_version)
        helper.set_model_props(model, {ACTIVATIONS: json.dumps(self.activations), **self.metadata})
        return model

    def input(self, name: str, kind: int, shape: Sequence[int | str]) -> str:
        self.inputs.append(helper.make_tensor_value_info(name, kind, shape))
        return name

    def output(self, name: str, shape: Sequence[int | str], kind: int | None = None) -> None:
        self.outputs.append(helper.make_tensor_value_info(name, kind or self.kind, shape))

    def caches(self, name: str, positions: str) -> tuple[str, str]:
        """Declare the inputs ``name``.key and .value: [rows, heads, ``positions``, head size]."""
        shape = self.cache_shape(positions)
        return self.input(f"{name}.key", self.cache_kind, shape), self.input(f"{name}.value", self.cache_kind, shape)

    @property
    def cache_kind(self) -> int:
        return self.kind

    def cache_shape(self, positions: str) -> list[int | str]:
        return ["rows", self.architecture.heads, positions, self.architecture.head_size]

    def constant(self, array: NDArray[Any], *, shared: bool = False) -> str:
        """Add an initializer; equal arrays are stored once, float32 ones in the graph's type.

        ``shared`` ones are stored once across graphs.
        """
        if array.dtype == np.float32:
            array = array.astype(helper.tensor_dtype_to_np_dtype(self.kind), copy=False)
        array = np.ascontiguousarray(array) if array.ndim else array
        name = hashlib.sha256(array.tobytes() + str((array.dtype, array.shape)).encode()).hexdigest()[:24]
        name = f"shared/{name}" if shared else f"constant/{name}"
        if name not in self.initializers:
            self.initializers[name] = numpy_helper.from_array(array, name)
        return name

    def scalar(self, value: float) -> str:
        return self.constant(np.array(value, np.float32))

    def integers(self, *values: int) -> str:
        """Add a constant int64 [values]."""
        return self.constant(np.array(values, np.int64))

    def op(self, kind: str, *inputs: str, domain: str = "", output: str = "", **attributes: Any) -> str:
        """Append a node with one output, or reuse an equal node. Returns the name of its output."""
        same = repr((kind, inputs, domain, attributes))
        if not output and same in self.written:
            return self.written[same]
        self.count += 1
        output = output or f"t{self.count}"
        name = f"{self.name}/{kind}/{self.count}"
        self.nodes.append(helper.make_node(kind, inputs, [output], name, domain=domain, **attributes))
        self.written[same] = output
        return output

    def split(self, packed: str, **attributes: Any) -> list[str]:
        """Split the last of three axes into query, key and value."""
        self.count += 1
        parts = [f"t{self.count}.{part}" for part in ("query", "key", "value")]
        name = f"{self.name}/Split/{self.count}"
        self.nodes.append(helper.make_node("Split", [packed], parts, name, axis=2, **attributes))
        return parts

    def embed(self, ids: str, table: Array, scale: float) -> str:
        """Look up rows of the embedding, times ``scale``."""
        rows = self.op("Gather", self.constant(table, shared=True), ids)
        return rows if scale == 1.0 else self.op("Mul", rows, self.scalar(scale))

    def linear(self, x: str, layer: Linear, name: str, *, output: str = "") -> str:
        self.activations[name] = x
        inputs = [x, self.constant(layer.weight)]
        if layer.bias is None:
            return self.op("MatMul", *inputs, output=output)
        return self.op("Add", self.op("MatMul", *inputs), self.constant(layer.bias), output=output)

    def give_cross(self, hidden: str, layer: Linear) -> None:
        """Write the encoder's output: keys and values of all decoder layers."""
        self.linear(hidden, layer, "cross", output="cross")
        self.output("cross", ["batch", "source", layer.weight.shape[1]])

    def project(self, x: str, table: Array, bias: Array | None, name: str, *, output: str) -> None:
        """Write x @ table.T + bias, with the stored rows of the embedding."""
        self.activations[name] = x
        inputs = [x, self.constant(table, shared=True), *([] if bias is None else [self.constant(bias)])]
        self.op("Gemm", *inputs, transB=1, output=output)

    def feed_forward(self, name: str, part: FeedForward) -> Callable[[str], str]:
        kind = activation_of(part.activation)

        def block(x: str) -> str:
            up = self.linear(x, part.up, f"{name}.up")
            if part.gate is None:
                inner = self.activation(kind, up)
            else:
                inner = self.op("Mul", self.activation(kind, self.linear(x, part.gate, f"{name}.gate")), up)
            return self.linear(inner, part.down, f"{name}.down")

        return block

    def norm(self, x: str, norm: Norm) -> str:
        gamma = self.constant(norm.gamma)
        if norm.beta is None:
            return self.root_mean_square_norm(x, gamma, norm.epsilon)
        return self.op("LayerNormalization", x, gamma, self.constant(norm.beta), axis=-1, epsilon=norm.epsilon)

    def residual(
        self, x: str, blocks: Sequence[tuple[Callable[[str], str], Norm]], last: Norm | None, *, pre_norm: bool
    ) -> str:
        """Apply the blocks one after another, each added to its input, with norms before or after each."""
        if not pre_norm:
            for block, norm in blocks:
                _, x = self._add_and_norm(x, block(x), norm)
            return x if last is None else self.norm(x, last)
        normalized = self.norm(x, blocks[0][1])
        assert last is not None, "pre-norm families have a last norm"
        for (block, _), norm in zip(blocks, [*(norm for _, norm in blocks[1:]), last]):
            x, normalized = self._add_and_norm(x, block(normalized), norm)
        return normalized

    def _add_and_norm(self, x: str, y: str, norm: Norm) -> tuple[str, str]:
        """Return (x + y, norm(x + y)), as two operators.

        ONNX Runtime's fused operator for both is several times slower (measured in 1.31).
        """
        total = self.op("Add", x, y)
        return total, self.norm(total, norm)

    def positions(self, count: str) -> str:
        """Return int64 [count]: 0, 1, ...; ``count`` is int64 []."""
        zero, one = (self.constant(np.array(n, np.int64)) for n in (0, 1))
        return self.op("Range", zero, count, one)

    def positions_below(self, length: str) -> str:
        """Return int32 [length], the type of lengths and pasts; ``length`` is int64 [1]."""
        return self.op("Cast", self.positions(self.op("Squeeze", length)), to=TensorProto.INT32)

    def encoder_bias(self, bias: RelativeBias, length: str) -> str:
        """Return the bias [1, heads, source, source]; ``length`` is int64 [1]."""
        positions = self.positions(self.op("Squeeze", length))
        rows = self.op("Unsqueeze", positions, self.integers(1))
        columns = self.op("Unsqueeze", positions, self.integers(0))
        return self._bias(bias, self.op("Sub", columns, rows), batch_axis=False)

    def decoder_bias(self, bias: RelativeBias, past: str, total: str) -> str:
        """Return the bias [rows, heads, 1, total]. Keys after a row's own position are ignored."""
        keys = self.positions(self.op("Cast", total, to=TensorProto.INT64))
        at = self.op("Cast", self.op("Unsqueeze", past, self.integers(1)), to=TensorProto.INT64)
        return self._bias(bias, self.op("Sub", keys, at), batch_axis=True)

    def _bias(self, bias: RelativeBias, distance: str, *, batch_axis: bool) -> str:
        last = bias.by_distance.shape[1] - 1
        index = self.op("Add", distance, self.constant(np.array(bias.zero, np.int64)))
        bounds = [self.constant(np.array(n, np.int64)) for n in (0, last)]
        index = self.op("Min", self.op("Max", index, bounds[0]), bounds[1])  # TensorRT cannot clip integers
        gathered = self.op("Gather", self.constant(bias.by_distance), index, axis=1)  # [heads, a, b]
        if not batch_axis:
            return self.op("Unsqueeze", gathered, self.integers(0))
        by_row = self.op("Transpose", gathered, perm=[1, 0, 2])
        return self.op("Unsqueeze", by_row, self.integers(2))


def save_with_weights_of(model: onnx.ModelProto, path: Path, other: Path) -> None:
    """Write a graph whose weights are those that ``other``, a graph in the same folder, has in its file.

    Weights that ``other`` lacks are stored in the graph itself.
    """
    stored = {
        tensor.name: tensor.external_data
        for tensor in onnx.load(other, load_external_data=False).graph.initializer
        if tensor.data_location == TensorProto.EXTERNAL
    }
    for tensor in model.graph.initializer:
        if tensor.name in stored:
            tensor.ClearField("raw_data")
            tensor.data_location = TensorProto.EXTERNAL
            tensor.external_data.extend(stored[tensor.name])
    path.write_bytes(model.SerializeToString())
