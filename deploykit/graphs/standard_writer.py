"""Write graphs for TensorRT: standard ONNX operators only, one type throughout, INT8 as explicit symmetric Q/DQ.

Caches keep their size for many steps, so that a GPU can repeat a captured step. Each row's new key and value go to the
position after its past; later positions are masked.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from onnx import TensorProto, numpy_helper

from deploykit.graphs.architecture import Array, Linear
from deploykit.graphs.onnx_export import HALF_OPSET
from deploykit.graphs.writer import Graph, Writer
from deploykit.quantization.qdq import Scheme, quantize

_HIDDEN = -65504.0  # fp16's lowest value, whose softmax weight is 0 in every type


@dataclass
class StandardWriter(Writer):
    """Writer of standard ONNX.

    With ``ranges``, linear layers have activations with a fixed scale and S8 weights with a scale per channel, of the types
    in ``scheme``.
    """

    scheme: Scheme = "s8s8"

    def finish(self) -> Graph:
        model = self.model({"": HALF_OPSET}, ir_version=9)
        if self.ranges is not None:
            ranges = {tensor: self.ranges[name] for name, tensor in self.activations.items() if name in self.ranges}
            model, _ = quantize(model, ranges, self.scheme, embeddings=False)
        return Graph(model, self.activations)

    def project(self, x: str, table: Array, bias: Array | None, name: str, *, output: str) -> None:
        """Write logits as float32, regardless of the graph's type."""
        super().project(x, table, bias, name, output=f"{output}/computed")
        self.op("Cast", f"{output}/computed", to=TensorProto.FLOAT, output=output)

    def give_cross(self, hidden: str, layer: Linear) -> None:
        """Write the encoder's output in the layout of the caches, so that a GPU moves each text with one copy."""
        a, width = self.architecture, layer.weight.shape[1]
        parts = 2 * len(a.decoder_layers)
        cross = self.op("Reshape", self.linear(hidden, layer, "cross"), self.integers(0, 0, parts, a.heads, -1))
        self.op("Transpose", cross, perm=[0, 2, 3, 1, 4], output="cross")
        self.output("cross", ["batch", parts, a.heads, "source", width // (parts * a.heads)])

    def padding_mask(self, lengths: str, length: str) -> str:
        """Return bool [batch, 1, 1, source]: True for tokens."""
        return self.op("Less", self.positions_below(length), self.op("Unsqueeze", lengths, self.integers(1, 2, 3)))

    def encoder_attention(self, packed: str, mask: str, bias: str) -> str:
        a = self.architecture
        query, key, value = (self.by_head(part, a.encoder_heads) for part in self.split(packed, num_outputs=3))
        return self.attend(query, key, value, mask, bias, a.encoder_scale)

    def by_head(self, x: str, heads: int) -> str:
        """Reshape [batch, tokens, heads x head size] to [batch, heads, tokens, head size]."""
        return self.op("Transpose", self.op("Reshape", x, self.integers(0, 0, heads, -1)), perm=[0, 2, 1, 3])

    def attend(self, query: str, key: str, value: str, visible: str, bias: str, scale: float) -> str:
        """Return attention, [batch, tokens, heads x head size], of queries, keys and values ``by_head``."""
        attended = self._attention(query, key, value, visible, bias, scale)
        return self.op("Reshape", self.op("Transpose", attended, perm=[0, 2, 1, 3]), self.integers(0, 0, -1))

    def begin_decoder(self) -> str:
        return self.op("Squeeze", self._length("past.0.key"))

    def self_attention(self, packed: str, layer: int, past: str, total: str, bias: str) -> str:
        query, *new = (self._one_token(part) for part in self.split(packed, num_outputs=3))
        positions = self.positions_below(self._length("past.0.key"))
        here = self.op("Equal", positions, self.op("Unsqueeze", past, self.integers(1, 2)))
        here = self.op("Unsqueeze", here, self.integers(3))  # [rows, 1, target, 1]
        present = f"present.{layer}.key", f"present.{layer}.value"
        for output, x, cache in zip(present, new, self.caches(f"past.{layer}", "target")):
            self.op("Where", here, x, cache, output=output)
            self.output(output, self.cache_shape("target"))
        return self._to_last(query, *present, past, positions, bias)

    def cross_attention(self, query: str, layer: int, source_last: str) -> str:
        caches = self.caches(f"cross.{layer}", "source")
        positions = self.positions_below(self._length("cross.0.key"))
        return self._to_last(self._one_token(query), *caches, source_last, positions, "")

    def activation(self, name: str, x: str) -> str:
        if name == "relu":
            return self.op("Relu", x)
        if name == "silu":
            return self.op("Mul", x, self.op("Sigmoid", x))
        if name == "gelu":
            inner = self.op("Erf", self.op("Mul", x, self.scalar(math.sqrt(0.5))))
        else:  # avoids the cube of x, which would exceed fp16's range
            linear = math.sqrt(2 / math.pi)
            square = self.op("Mul", self.op("Mul", x, x), self.scalar(0.044715 * linear))
            inner = self.op("Tanh", self.op("Mul", x, self.op("Add", square, self.scalar(linear))))
        return self.op("Mul", self.op("Mul", x, self.scalar(0.5)), self.op("Add", inner, self.scalar(1.0)))

    def root_mean_square_norm(self, x: str, gamma: str, epsilon: float) -> str:
        """Compute the norm in float32, because squares may exceed fp16's range."""
        wide = self.op("Cast", x, to=TensorProto.FLOAT)
        mean = self.op("ReduceMean", self.op("Mul", wide, wide), self.integers(-1), keepdims=1)
        least = self.op("Constant", value=numpy_helper.from_array(np.array(epsilon, np.float32)))
        normalized = self.op("Div", wide, self.op("Sqrt", self.op("Add", mean, least)))
        return self.op("Mul", self.op("Cast", normalized, to=self.kind), gamma)

    def _to_last(self, query: str, key: str, value: str, last: str, positions: str, bias: str) -> str:
        """Let one token per row attend to the ``positions`` up to the row's ``last``."""
        visible = self.op("LessOrEqual", positions, self.op("Unsqueeze", last, self.integers(1, 2, 3)))
        attended = self._attention(query, key, value, visible, bias, self.architecture.scale)
        return self.op("Reshape", attended, self.integers(0, 1, -1))

    def _attention(self, query: str, key: str, value: str, visible: str, bias: str, scale: float) -> str:
        """Return attention in the query's shape: [rows, heads, tokens, head size]."""
        if scale != 1.0:
            query = self.op("Mul", query, self.scalar(scale))
        scores = self.op("MatMul", query, self.op("Transpose", key, perm=[0, 1, 3, 2]))
        if bias:
            scores = self.op("Add", scores, bias)
        scores = self.op("Where", visible, scores, self.scalar(_HIDDEN))
        return self.op("MatMul", self.op("Softmax", scores, axis=-1), value)

    def _one_token(self, x: str) -> str:
        """Reshape [rows, 1, heads x head size] to [rows, heads, 1, head size]."""
        return self.op("Reshape", x, self.integers(0, self.architecture.heads, 1, -1))

    def _length(self, cache: str) -> str:
        return self.op("Shape", cache, start=2, end=3)
