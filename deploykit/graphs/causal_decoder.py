"""Build the graph that deploykit decodes a language model with: caches are written in place, row by row.

Inputs: input_ids int64 [rows, tokens]; past_lengths int32 [rows], the tokens of each row in its caches; total int32 [],
the largest past length plus ``tokens``; wanted int64 [wanted], the places in ``input_ids``, counted through all rows, whose
logits are returned; and for each layer past.N.key and .value [rows, key heads, positions, head size]. Outputs: logits
[wanted, vocabulary], and present.N.key and .value, which are the same memory as the inputs. More than one token a row is
allowed for one row only.

Each row attends to its own length only, so its result depends on nothing else in the batch. The weights are those of
``causal_lm``'s graph, in the same file. Source: ONNX Runtime, "Contrib operators", com.microsoft.GroupQueryAttention.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import onnx
from onnx import TensorProto, helper

from deploykit.graphs.architecture import HEAD_MULTIPLE, Linear, Norm
from deploykit.graphs.causal_architecture import CausalArchitecture, CausalLayer, Rope
from deploykit.graphs.causal_lm import Bits, CausalWriter
from deploykit.graphs.onnxruntime_writer import CONTRIB, ORT_ACTIVATIONS
from deploykit.quantization.compensated import Rounding
from deploykit.quantization.qdq import Ranges

_OPSET, _IR = 19, 9


def build_causal_decoder(
    architecture: CausalArchitecture,
    bits: Bits | None = None,
    *,
    ranges: Ranges | None = None,
    kept: Collection[str] = (),
    rounding: Rounding | None = None,
) -> onnx.ModelProto:
    """Return the graph in fp32, or with linear layers of ``bits``; see ``build_causal_lm``."""
    return _DecoderWriter(
        "decoder", cast(Any, None), ranges, a=architecture, bits=bits, kept=frozenset(kept), rounding=rounding
    ).build()


@dataclass
class _DecoderWriter(CausalWriter):
    def build(self) -> onnx.ModelProto:
        a = self.a
        ids = self.input("input_ids", TensorProto.INT64, ["rows", "tokens"])
        past = self.input("past_lengths", TensorProto.INT32, ["rows"])
        self.input("total", TensorProto.INT32, [])
        wanted = self.input("wanted", TensorProto.INT64, ["wanted"])
        tokens = self.op("Shape", ids, start=1, end=2)
        before = self.op("Unsqueeze", self.op("Cast", past, to=TensorProto.INT64), self.integers(1))
        self.positions_of_tokens = self.op("Add", before, self.positions(self.op("Squeeze", tokens)))
        last = self.op("Sub", self.op("Cast", tokens, to=TensorProto.INT32), self.constant(np.array([1], np.int32)))
        self.last = self.op("Add", past, last)
        hidden = self.embed(ids, a.embedding, a.embedding_scale)
        if a.positions is not None:
            hidden = self.op("Add", hidden, self.op("Gather", self.constant(a.positions), self.positions_of_tokens))
        for i, layer in enumerate(a.layers):
            hidden = self.layer(i, layer, hidden)
        flat = self.op("Reshape", hidden, self.integers(-1, a.embedding.shape[1]))
        self.logits(self.norm(self.op("Gather", flat, wanted), a.norm), ["wanted"])
        return self.model({"": _OPSET, CONTRIB: 1}, _IR)

    def activation(self, name: str, x: str) -> str:
        kind, domain, attributes = ORT_ACTIVATIONS[name]
        return self.op(kind, x, domain=domain, **attributes)

    def root_mean_square_norm(self, x: str, gamma: str, epsilon: float) -> str:
        return self.op("SimplifiedLayerNormalization", x, gamma, axis=-1, epsilon=epsilon)

    def attention(self, i: int, layer: CausalLayer, x: str) -> str:
        a, part = self.a, layer.attention

        def heads(linear: Linear, name: str, count: int, norm: Norm | None, rope: Rope | None) -> str:
            y = self.linear(x, linear, f"layers.{i}.attention.{name}")
            if norm is not None:
                y = self.norm(self.op("Reshape", y, self.integers(0, 0, -1, a.head_size)), norm)
                y = self.op("Reshape", y, self.integers(0, 0, -1))
            return self._widened(y if rope is None else self._rotated(y, rope, count), count)

        query = heads(part.query, "query", a.heads, layer.query_norm, layer.rope)
        key = heads(part.key, "key", a.key_heads, layer.key_norm, layer.rope)
        value = heads(part.value, "value", a.key_heads, None, None)
        shape: list[int | str] = ["rows", a.key_heads, "positions", a.head_size + self._missing]
        pasts = [self.input(f"past.{i}.{name}", TensorProto.FLOAT, shape) for name in ("key", "value")]
        presents = [f"present.{i}.{name}" for name in ("key", "value")]
        for name in presents:
            self.output(name, shape, TensorProto.FLOAT)
        self.count += 1
        attributes: dict[str, Any] = {"scale": a.scale}
        if layer.window is not None:
            attributes["local_window_size"] = layer.window
        if a.attention_cap:
            attributes["softcap"] = a.attention_cap
        attended = f"t{self.count}"
        self.nodes.append(
            helper.make_node(
                "GroupQueryAttention", [query, key, value, *pasts, self.last, "total"], [attended, *presents],
                f"{self.name}/GroupQueryAttention/{self.count}", domain=CONTRIB,
                num_heads=a.heads, kv_num_heads=a.key_heads, **attributes,
            )
        )  # fmt: skip
        return self.linear(self._narrowed(attended), part.out, f"layers.{i}.attention.out")

    @property
    def _missing(self) -> int:
        """The zeros that each head needs at its end: ONNX Runtime's attention takes heads of a multiple of 8."""
        return -self.a.head_size % HEAD_MULTIPLE

    def _widened(self, x: str, heads: int) -> str:
        """Add zeros to each head of [rows, tokens, heads x head size]; scores and other channels stay the same."""
        if not self._missing:
            return x
        parts = self.op("Reshape", x, self.integers(0, 0, heads, self.a.head_size))
        padded = self.op("Pad", parts, self.integers(*[0] * 7, self._missing))
        return self.op("Reshape", padded, self.integers(0, 0, -1))

    def _narrowed(self, x: str) -> str:
        """Drop what ``_widened`` has added."""
        if not self._missing:
            return x
        a = self.a
        parts = self.op("Reshape", x, self.integers(0, 0, a.heads, a.head_size + self._missing))
        cut = self.op("Slice", parts, self.integers(0), self.integers(a.head_size), self.integers(3))
        return self.op("Reshape", cut, self.integers(0, 0, -1))

    def _rotated(self, x: str, rope: Rope, heads: int) -> str:
        """Rotate the first channels of each head of [rows, tokens, heads x head size] by their positions.

        The operator looks up cosines by position. It gets those of these tokens only, numbered through all rows.
        """
        half = len(rope.frequencies)
        steps = self.op(
            "Cast", self.op("Reshape", self.positions_of_tokens, self.integers(-1, 1)), to=TensorProto.FLOAT
        )
        angles = self.op("Mul", steps, self.constant(rope.frequencies[None]))
        tables = [self.op("Cos", angles), self.op("Sin", angles)]
        if rope.scale != 1.0:
            tables = [self.op("Mul", table, self.scalar(rope.scale)) for table in tables]
        shape = self.op("Shape", self.positions_of_tokens)
        numbers = self.op("Reshape", self.positions(self.op("ReduceProd", shape, keepdims=0)), shape)
        return self.op(
            "RotaryEmbedding", x, numbers, *tables, domain=CONTRIB,
            num_heads=heads, rotary_embedding_dim=2 * half if 2 * half < self.a.head_size else 0,
        )  # fmt: skip
