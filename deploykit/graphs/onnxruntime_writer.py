"""Write graphs for ONNX Runtime with its contrib operators: in-place caches, no computation of padding, INT8 kernels.

The decoder uses GroupQueryAttention: each row attends to its own length only, so its result depends on nothing else in
the batch, bit for bit. Cross-attention uses it too: the last source position is passed as the "new" key and value, and
written to where it already is.

Source: ONNX Runtime, ContribOperators.md.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from onnx import TensorProto, helper

from deploykit.graphs.architecture import Array, Linear
from deploykit.graphs.writer import Graph, Writer
from deploykit.quantization.qdq import activation_parameters, quantize_weight
from deploykit.runtime.engines.seq2seq import CROSS_SCALES, cache_names

OPSET = 17
CONTRIB = "com.microsoft"
ORT_ACTIVATIONS: Mapping[str, tuple[str, str, dict[str, Any]]] = {
    "relu": ("Relu", "", {}),
    "silu": ("QuickGelu", CONTRIB, {"alpha": 1.0}),
    "gelu": ("Gelu", CONTRIB, {}),
    "gelu by tanh": ("FastGelu", CONTRIB, {}),
}


@dataclass
class OnnxRuntimeWriter(Writer):
    """Writer for ONNX Runtime.

    With ``ranges``, linear layers have U8 activations with a fixed scale and S8 weights with a scale per channel.
    Caches are S8 with a fixed scale each, because they are most of the memory that a step with many rows reads.
    """

    quantized: dict[str, tuple[str, str, str, float]] = field(default_factory=dict)

    def finish(self) -> Graph:
        return Graph(self.model({"": OPSET, CONTRIB: 1}, ir_version=8), self.activations)

    def embed(self, ids: str, table: Array, scale: float) -> str:
        """Look up rows of the embedding, times ``scale``. In INT8, each row has its own scale."""
        if self.ranges is None:
            return super().embed(ids, table, scale)
        values, scales = quantize_weight(table, axis=0)
        rows = self.op("Cast", self.op("Gather", self.constant(values, shared=True), ids), to=TensorProto.FLOAT)
        return self.op("Mul", rows, self.op("Gather", self.constant(scales.reshape(-1, 1) * np.float32(scale)), ids))

    def linear(self, x: str, layer: Linear, name: str, *, output: str = "") -> str:
        if self.ranges is None or name not in self.ranges:
            return super().linear(x, layer, name, output=output)
        self.activations[name] = x
        values, scale, zero, _ = self._quantize(x, name)
        weight, scales = quantize_weight(layer.weight, axis=1)
        inputs = [values, self.constant(weight), scale, self.constant(scales), zero, ""]
        inputs += [] if layer.bias is None else [self.constant(layer.bias)]
        while not inputs[-1]:
            inputs.pop()
        return self.op("MatMulIntegerToFloat", *inputs, domain=CONTRIB, output=output)

    def project(self, x: str, table: Array, bias: Array | None, name: str, *, output: str) -> None:
        if self.ranges is None or name not in self.ranges:
            super().project(x, table, bias, name, output=output)
            return
        self.activations[name] = x
        values, scale, zero, step = self._quantize(x, name)
        weight, scales = quantize_weight(table, axis=0)
        inputs = [values, scale, zero, self.constant(weight, shared=True), self.constant(scales)]
        inputs.append(self.constant(np.zeros(len(scales), np.int8)))
        if bias is not None:  # rounded to quantization steps of the product: 1/10,000 of INT8's rounding error
            inputs.append(self.constant(np.clip(np.rint(bias / (scales * step)), -(2**30), 2**30).astype(np.int32)))
        self.op("QGemm", *inputs, domain=CONTRIB, transB=1, output=output)

    def _quantize(self, x: str, name: str) -> tuple[str, str, str, float]:
        assert self.ranges is not None
        if x not in self.quantized:
            scale, zero = activation_parameters(*self.ranges[name], "u8s8")
            parameters = self.constant(np.asarray(scale)), self.constant(np.asarray(zero))
            self.quantized[x] = (self.op("QuantizeLinear", x, *parameters), *parameters, float(scale))
        return self.quantized[x]

    @property
    def cache_kind(self) -> int:
        """Return the type of the caches: INT8 for all or for none, because they share memory."""
        quantized = self.ranges is not None and cache_names(1)[0] in self.ranges
        return TensorProto.INT8 if quantized else self.kind

    def give_cross(self, hidden: str, layer: Linear) -> None:
        if self.cache_kind != TensorProto.INT8:
            super().give_cross(hidden, layer)
            return
        layers = len(self.architecture.decoder_layers)
        scales = [self._cache_scale(name) for name in cache_names(layers) if "cross" in name]
        by_column = np.repeat(np.array(scales, np.float32), layer.weight.shape[1] // len(scales))
        zeros = self.constant(np.zeros(len(by_column), np.int8))
        cross = self.linear(hidden, layer, "cross")
        self.op("QuantizeLinear", cross, self.constant(by_column), zeros, axis=2, output="cross")
        self.output("cross", ["batch", "source", len(by_column)], TensorProto.INT8)
        self.metadata[CROSS_SCALES] = json.dumps(scales)

    def _cache_scale(self, name: str) -> float:
        assert self.ranges is not None
        return float(activation_parameters(*self.ranges[name], "s8s8")[0])

    def padding_mask(self, lengths: str, length: str) -> str:
        """Return int32 [batch, source]: 1 for tokens, 0 for padding."""
        positions = self.positions_below(length)
        ends = self.op("Unsqueeze", lengths, self.integers(1))
        return self.op("Cast", self.op("Less", positions, ends), to=TensorProto.INT32)

    def encoder_attention(self, packed: str, mask: str, bias: str) -> str:
        a = self.architecture
        inputs = [*self.split(packed), "", mask, *([bias] if bias else [])]
        return self.op("MultiHeadAttention", *inputs, domain=CONTRIB, num_heads=a.encoder_heads, scale=a.encoder_scale)

    def begin_decoder(self) -> str:
        self.input("source_total", TensorProto.INT32, [])
        return self.input("total", TensorProto.INT32, [])

    def self_attention(self, packed: str, layer: int, past: str, total: str, bias: str) -> str:
        caches = self.caches(f"past.{layer}", "target")
        inputs = [packed, "", "", *caches, past, total, *(["", "", "", bias] if bias else [])]
        return self._attention(inputs, f"present.{layer}", "target", f"caches.{layer}.self")

    def cross_attention(self, query: str, layer: int, source_last: str) -> str:
        width = self.architecture.heads * self.architecture.head_size
        last = [self.input(f"cross.{layer}.last_{part}", self.kind, ["rows", 1, width]) for part in ("key", "value")]
        caches = self.caches(f"cross.{layer}", "source")
        inputs = [query, *last, *caches, source_last, "source_total"]
        return self._attention(inputs, f"cross_present.{layer}", "source", f"caches.{layer}.cross")

    def _attention(self, inputs: list[str], present: str, positions: str, caches: str) -> str:
        self.count += 1
        a, names = self.architecture, (f"{present}.key", f"{present}.value")
        for name in names:
            self.output(name, self.cache_shape(positions), self.cache_kind)
        quantization: dict[str, Any] = {}
        if self.cache_kind == TensorProto.INT8:
            scales = [np.array([self._cache_scale(f"{caches}_{part}")], np.float32) for part in ("key", "value")]
            inputs = [*inputs, *[""] * (12 - len(inputs)), *map(self.constant, scales)]
            quantization = {"k_quant_type": "PER_TENSOR", "v_quant_type": "PER_TENSOR", "kv_cache_bit_width": 8}
        self.nodes.append(
            helper.make_node(
                "GroupQueryAttention", inputs, [f"t{self.count}", *names],
                f"{self.name}/GroupQueryAttention/{self.count}", domain=CONTRIB,
                num_heads=a.heads, kv_num_heads=a.heads, scale=a.scale, **quantization,
            )
        )  # fmt: skip
        return f"t{self.count}"

    def activation(self, name: str, x: str) -> str:
        kind, domain, attributes = ORT_ACTIVATIONS[name]
        return self.op(kind, x, domain=domain, **attributes)

    def root_mean_square_norm(self, x: str, gamma: str, epsilon: float) -> str:
        return self.op("SimplifiedLayerNormalization", x, gamma, axis=-1, epsilon=epsilon)
