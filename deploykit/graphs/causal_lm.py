"""Build the graph of a decoder-only language model in the layout of optimum's ``text-generation-with-past``.

Inputs: input_ids and position_ids int64 [batch, tokens], attention_mask int64 [batch, past + tokens], and for each
layer past_key_values.N.key and .value [batch, key heads, past, head size]. Outputs: logits [batch, tokens, vocabulary],
present.N.key and .value [batch, key heads, past + tokens, head size]. Padding is on the left.

Quantized linear layers are ONNX Runtime's MatMulNBits: weights in blocks of 32 with one scale each. In INT8, and in
INT4 if the CPU has kernels for it, activations are rounded to INT8 too, block by block of each token. So a token's
result does not depend on other tokens, and no calibration is needed. Source: ONNX Runtime, "Contrib operators",
com.microsoft.MatMulNBits.

With calibrated ``ranges``, INT8 layers of the blocks are MatMulIntegerToFloat instead: U8 activations with one fixed scale,
S8 weights with a scale per output channel. Embedding and head stay as above. Source: the same page,
com.microsoft.MatMulIntegerToFloat.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto

from deploykit.graphs.architecture import Array, Linear, Norm
from deploykit.graphs.causal_architecture import CausalArchitecture, CausalLayer, Rope
from deploykit.graphs.standard_writer import StandardWriter
from deploykit.graphs.writer import Graph
from deploykit.quantization.compensated import Fit, Levels, Rounding, int8_levels
from deploykit.quantization.qdq import Ranges, activation_parameters, quantize_weight

Bits = Literal[4, 8]
BLOCK = 32
_HIDDEN = -3.4e38
_OPSET, _IR = 19, 9
_INT8_COMPUTE = 4
"""MatMulNBits' accuracy level at which activations are rounded to INT8."""

EMBEDDING, HEAD = "embedding", "head"


def part_of(layer: str) -> str:
    """Return the unit that is quantized as a whole: attention or feed-forward of a layer, or the head.

    The embedding is another one.
    """
    return layer.rsplit(".", 1)[0] if layer != HEAD else HEAD


def parts_of(architecture: CausalArchitecture) -> list[str]:
    """Return all parts of a model, in the order of computation."""
    blocks = [f"layers.{i}.{part}" for i in range(len(architecture.layers)) for part in ("attention", "feed_forward")]
    return [EMBEDDING, *blocks, HEAD]


def build_causal_lm(
    architecture: CausalArchitecture,
    bits: Bits | None = None,
    *,
    ranges: Ranges | None = None,
    kept: Collection[str] = (),
    rounding: Rounding | None = None,
) -> onnx.ModelProto:
    """Return the graph in fp32, or with linear layers of ``bits``; ``kept`` parts (``parts_of``) stay in fp32.

    ``ranges``: of the inputs of INT8 layers, by the layer's name; without them activations are quantized dynamically.
    ``rounding``: of weights in blocks; without it each weight is rounded to the nearest level.
    """
    return CausalWriter(
        "model", cast(Any, None), ranges, a=architecture, bits=bits, kept=frozenset(kept), rounding=rounding
    ).build()


@dataclass
class CausalWriter(StandardWriter):
    a: CausalArchitecture = field(kw_only=True)
    bits: Bits | None = None
    kept: frozenset[str] = frozenset()
    rounding: Rounding | None = None

    def build(self) -> onnx.ModelProto:
        a = self.a
        ids = self.input("input_ids", TensorProto.INT64, ["batch", "tokens"])
        self.input("attention_mask", TensorProto.INT64, ["batch", "total"])
        positions = self.input("position_ids", TensorProto.INT64, ["batch", "tokens"])
        hidden = self.embed(ids, a.embedding, a.embedding_scale)
        if a.positions is not None:
            hidden = self.op("Add", hidden, self.op("Gather", self.constant(a.positions), positions))
        for i, layer in enumerate(a.layers):
            hidden = self.layer(i, layer, hidden)
        self.logits(self.norm(hidden, a.norm), ["batch", "tokens"])
        opsets = {"": _OPSET} if self.bits is None else {"": _OPSET, "com.microsoft": 1}
        model = self.model(opsets, _IR)
        onnx.checker.check_model(model)
        return model

    def finish(self) -> Graph:
        return Graph(self.build(), self.activations)

    def linear(self, x: str, layer: Linear, name: str, *, output: str = "") -> str:
        if self.bits is None or part_of(name) in self.kept:
            return super().linear(x, layer, name, output=output)
        if self.ranges is not None and name in self.ranges:
            product = self._static(x, layer.weight, self.ranges[name])
        else:
            product = self._quantized(x, layer.weight.T, self.bits, name)
        return product if layer.bias is None else self.op("Add", product, self.constant(layer.bias), output=output)

    def _static(self, x: str, weight: Array, limits: tuple[float, float]) -> str:
        """Compute x @ weight, of [in, out], in INT8; ``limits``: the range of x."""
        step, zero = (self.constant(np.asarray(value)) for value in activation_parameters(*limits, "u8s8"))
        values, scales = quantize_weight(weight, axis=1)
        inputs = [self.op("QuantizeLinear", x, step, zero), self.constant(values), step, self.constant(scales), zero]
        return self.op("MatMulIntegerToFloat", *inputs, domain="com.microsoft")

    def embed(self, ids: str, table: Array, scale: float) -> str:
        """Look up the embedding, which is stored in 8 bits like a tied head, independently of the linear layers."""
        if self.bits is None or EMBEDDING in self.kept:
            return super().embed(ids, table, scale)
        values, scales, _ = quantize_blocks(table, 8)
        rows = self.op("Cast", self.op("Gather", self.constant(values), ids), to=TensorProto.FLOAT)
        steps = self.op("Reshape", self.constant(scales.ravel()), self.integers(*scales.shape, 1))
        rows = self.op("Mul", self.op("Sub", rows, self.scalar(128.0)), self.op("Gather", steps, ids))
        rows = self.op("Reshape", rows, self.integers(0, 0, -1))
        if table.shape[1] % BLOCK:
            rows = self.op("Slice", rows, self.integers(0), self.integers(table.shape[1]), self.integers(2))
        return rows if scale == 1.0 else self.op("Mul", rows, self.scalar(scale))

    def _quantized(self, x: str, weight: Array, bits: Bits, name: str, output: str = "") -> str:
        """Compute x @ weight.T with quantized ``weight`` [out, in] of the layer ``name``."""
        rows, columns = weight.shape
        known = None if self.rounding is None else self.rounding.rounded(name, weight.T, BLOCK, _FITS[bits])
        if known is None:
            values, scales, zeros = quantize_blocks(weight, bits)
        else:
            rounded = _in_blocks(known.values.astype(np.int16))
            values, scales, zeros = _stored(rounded, known.scales, known.minimums, bits)
        inputs = [x, self.constant(values), self.constant(scales.ravel())]
        if zeros is not None:
            inputs.append(self.constant(zeros.ravel()))
        return self.op(
            "MatMulNBits", *inputs, domain="com.microsoft", output=output, K=columns, N=rows, bits=bits,
            block_size=BLOCK, accuracy_level=_INT8_COMPUTE,
        )  # fmt: skip

    def layer(self, i: int, layer: CausalLayer, hidden: str) -> str:
        def normed(x: str, norm: Norm | None) -> str:
            return x if norm is None else self.norm(x, norm)

        attended = self.attention(i, layer, self.norm(hidden, layer.attention_norm))
        attended = normed(attended, layer.after_attention)
        feed_forward: Callable[[str], str] = self.feed_forward(f"layers.{i}.feed_forward", layer.feed_forward)
        if layer.parallel:
            added = feed_forward(self.norm(hidden, layer.feed_forward_norm))
            return self.op("Add", self.op("Add", added, attended), hidden)
        hidden = self.op("Add", hidden, attended)
        added = normed(feed_forward(self.norm(hidden, layer.feed_forward_norm)), layer.after_feed_forward)
        return self.op("Add", hidden, added)

    def attention(self, i: int, layer: CausalLayer, x: str) -> str:
        """Let each token attend to those before it. ``x``: [batch, tokens, hidden], and so is the result."""
        a, part = self.a, layer.attention

        def heads(linear: Linear, name: str, norm: Norm | None, rope: Rope | None) -> str:
            y = self.linear(x, linear, f"layers.{i}.attention.{name}")
            y = self.op("Reshape", y, self.integers(0, 0, -1, a.head_size))
            if norm is not None:
                y = self.norm(y, norm)
            y = self.op("Transpose", y, perm=[0, 2, 1, 3])
            return y if rope is None else self._rotate(y, rope)

        query = heads(part.query, "query", layer.query_norm, layer.rope)
        new = heads(part.key, "key", layer.key_norm, layer.rope), heads(part.value, "value", None, None)
        key, value = (self._present(f"{i}.{name}", values) for name, values in zip(("key", "value"), new))
        # Stack the queries that share a key head, for one product.
        query = self.op("Mul", query, self.scalar(a.scale))
        grouped = self.op("Reshape", query, self.integers(0, a.key_heads, -1, a.head_size))
        scores = self.op("MatMul", grouped, self.op("Transpose", key, perm=[0, 1, 3, 2]))
        if a.attention_cap:
            scores = self._capped(scores, a.attention_cap)
        bias = self._visibility(layer.window)
        shape = self.op("Shape", bias, start=2, end=4)
        if a.heads != a.key_heads:
            split = self.op("Concat", self.integers(0, a.key_heads, a.heads // a.key_heads), shape, axis=0)
            scores = self.op("Reshape", scores, split)
            bias = self.op("Unsqueeze", bias, self.integers(1))
        weights = self.op("Softmax", self.op("Add", scores, bias), axis=-1)
        if a.heads != a.key_heads:
            total = self.op("Shape", bias, start=4, end=5)
            weights = self.op("Reshape", weights, self.op("Concat", self.integers(0, a.key_heads, -1), total, axis=0))
        attended = self.op("MatMul", weights, value)
        tokens = self.op("Shape", query, start=2, end=3)
        back = self.op("Concat", self.integers(0, a.heads), tokens, self.integers(a.head_size), axis=0)
        attended = self.op("Transpose", self.op("Reshape", attended, back), perm=[0, 2, 1, 3])
        flat = self.op("Reshape", attended, self.integers(0, 0, a.heads * a.head_size))
        return self.linear(flat, part.out, f"layers.{i}.attention.out")

    def _present(self, name: str, new: str) -> str:
        a = self.a
        shape: list[int | str] = ["batch", a.key_heads, "past", a.head_size]
        past = self.input(f"past_key_values.{name}", TensorProto.FLOAT, shape)
        present = self.op("Concat", past, new, axis=2, output=f"present.{name}")
        self.output(present, ["batch", a.key_heads, "total", a.head_size], TensorProto.FLOAT)
        return present

    def _rotate(self, x: str, rope: Rope) -> str:
        """Rotate the first channels of each head, [batch, heads, tokens, head size], by their positions."""
        half = len(rope.frequencies)
        steps = self.op("Cast", self.op("Unsqueeze", "position_ids", self.integers(1, 3)), to=TensorProto.FLOAT)
        angles = self.op("Mul", steps, self.constant(rope.frequencies[None, None, None]))
        cosine, sine = self.op("Cos", angles), self.op("Sin", angles)
        if rope.scale != 1.0:
            cosine, sine = (self.op("Mul", part, self.scalar(rope.scale)) for part in (cosine, sine))

        def channels(start: int, end: int) -> str:
            return self.op("Slice", x, self.integers(start), self.integers(end), self.integers(3))

        first, second = channels(0, half), channels(half, 2 * half)
        rotated = [
            self.op("Sub", self.op("Mul", first, cosine), self.op("Mul", second, sine)),
            self.op("Add", self.op("Mul", second, cosine), self.op("Mul", first, sine)),
        ]
        rest = [channels(2 * half, self.a.head_size)] if 2 * half < self.a.head_size else []
        return self.op("Concat", *rotated, *rest, axis=3)

    def _visibility(self, window: int | None) -> str:
        """Return the attention bias, float32 [batch, 1, tokens, total]: 0 where a token attends, else a huge negative
        number."""
        tokens = self.op("Squeeze", self.op("Shape", "input_ids", start=1, end=2))
        total = self.op("Squeeze", self.op("Shape", "attention_mask", start=1, end=2))
        keys = self.positions(total)
        queries = self.op("Add", self.positions(tokens), self.op("Sub", total, tokens))
        queries = self.op("Unsqueeze", queries, self.integers(1))
        visible = self.op("LessOrEqual", keys, queries)
        if window is not None:
            nearest = self.op("Greater", keys, self.op("Sub", queries, self.constant(np.array(window, np.int64))))
            visible = self.op("And", visible, nearest)
        real = self.op("Cast", self.op("Unsqueeze", "attention_mask", self.integers(1, 2)), to=TensorProto.BOOL)
        visible = self.op("And", self.op("Unsqueeze", visible, self.integers(0, 1)), real)
        return self.op("Where", visible, self.scalar(0.0), self.scalar(_HIDDEN))

    def _capped(self, x: str, cap: float) -> str:
        return self.op("Mul", self.op("Tanh", self.op("Div", x, self.scalar(cap))), self.scalar(cap))

    def logits(self, hidden: str, shape: list[int | str]) -> None:
        """Write the output ``logits``, [*shape, vocabulary], of the normed ``hidden`` state, [*shape, hidden]."""
        a = self.a
        vocabulary, width = a.head.shape
        last = "" if a.logit_cap else "logits"
        if self.bits is not None and HEAD not in self.kept:
            biased = a.head_bias is not None
            # Always eight bits: the head decides between nearly equal tokens.
            logits = self._quantized(hidden, a.head, 8, HEAD, output="" if biased else last)
            if a.head_bias is not None:
                logits = self.op("Add", logits, self.constant(a.head_bias), output=last)
        else:
            # A tied head shares the stored embedding.
            inputs = [self.op("Reshape", hidden, self.integers(-1, width)), self.constant(a.head, shared=True)]
            if a.head_bias is not None:
                inputs.append(self.constant(a.head_bias))
            product = self.op("Gemm", *inputs, transB=1)
            sizes = self.op("Concat", self.op("Shape", hidden, end=-1), self.integers(vocabulary), axis=0)
            logits = self.op("Reshape", product, sizes, output=last)
        if a.logit_cap:
            cap = self.scalar(a.logit_cap)
            self.op("Mul", self.op("Tanh", self.op("Div", logits, cap)), cap, output="logits")
        self.output("logits", [*shape, vocabulary], TensorProto.FLOAT)
        logit = self.outputs.pop()
        self.outputs.insert(0, logit)


def int4_levels(block: Array) -> Levels:
    """Return 16 levels of which 0 is one."""
    low, high = np.minimum(block.min(0), 0), np.maximum(block.max(0), 0)
    scale = (high - low) / np.float32(15)
    scale = np.where(scale == 0, np.float32(1), scale).astype(np.float32)
    return Levels(scale, -np.clip(np.rint(-low / scale), 0, 15) * scale, 0, 15)


_FITS: Mapping[Bits, Fit] = {8: int8_levels, 4: int4_levels}


def quantize_blocks(
    weight: Array, bits: Bits
) -> tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[np.uint8] | None]:
    """Quantize rows of ``weight`` [out, in] in blocks of ``BLOCK``, as MatMulNBits stores them.

    Returns values uint8 [out, blocks, bytes], scales float32 [out, blocks] and, for 4 bits, zero points, packed uint8
    [out, bytes]. 8 bits are symmetric about 128; 4 bits have one zero point per block.
    """
    parts = _in_blocks(weight.T)
    levels = _FITS[bits](parts)
    return _stored(levels.round(parts), levels.scale, levels.minimum, bits)


def _in_blocks(weight: NDArray[Any]) -> NDArray[Any]:
    """Return weights [in, out] as [BLOCK, blocks, out], zeros after the last."""
    padded = np.pad(weight, ((0, -len(weight) % BLOCK), (0, 0)))
    return padded.reshape(-1, BLOCK, weight.shape[1]).transpose(1, 0, 2)


def _stored(
    values: NDArray[Any], scales: Array, minimums: Array, bits: Bits
) -> tuple[NDArray[np.uint8], Array, NDArray[np.uint8] | None]:
    """Return ``values`` [BLOCK, blocks, out] and ``scales`` and ``minimums`` [blocks, out] as ``quantize_blocks`` does."""
    numbers, scales = np.ascontiguousarray(values.transpose(2, 1, 0)), np.ascontiguousarray(scales.T)
    if bits == 8:
        return (numbers + 128).astype(np.uint8), scales, None
    zeros = np.rint(-minimums.T / scales).astype(np.uint8)
    zeros = np.pad(zeros, ((0, 0), (0, zeros.shape[1] % 2)))
    return _in_pairs(numbers.astype(np.uint8)), scales, _in_pairs(zeros)


def _in_pairs(nibbles: NDArray[np.uint8]) -> NDArray[np.uint8]:
    packed: NDArray[np.uint8] = nibbles[..., ::2] | (nibbles[..., 1::2] << np.uint8(4))
    return packed
