"""Write a language model's weights for the engine ``native``, in INT8, INT4 or fp32.

INT8: a scale for each output channel; the inputs are transformed (``Transform``). INT4: a scale and a minimum for each 32 inputs of a
channel; embedding and head are INT8. The layout is that of ``csrc/causal.h``.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deploykit.graphs.architecture import Array, Linear, Norm
from deploykit.graphs.causal_architecture import CausalArchitecture, CausalLayer, Rope
from deploykit.graphs.causal_lm import EMBEDDING, HEAD, Bits, int4_levels
from deploykit.graphs.native_writer import write_weights
from deploykit.graphs.seq2seq import side_by_side
from deploykit.graphs.writer import activation_of
from deploykit.quantization.compensated import Levels, Rounded, Rounding, int8_levels
from deploykit.runtime.engines.native.causal_weights import BLOCK, CACHES, COLUMNS

_FOUR = 4
"""Inputs of an INT8 matrix that are stored side by side."""
_MOST_TOGETHER = 512
"""Inputs of an INT8 matrix that are transformed together at most: more cost time, and gained nothing."""
_SHRINK = (1.0, 0.9, 0.8)
"""Shares of a block's range that INT4 tries to cover; values outside are cut off."""
_NORMS = ("attention_norm", "feed_forward_norm", "query_norm", "key_norm", "after_attention", "after_feed_forward")


@dataclass(frozen=True)
class _Matrix:
    kind: str
    tensors: Mapping[str, NDArray[Any]]


class Transform:
    """What ``native`` does with the inputs of an INT8 matrix before it rounds them to 8 bits.

    It multiplies them by ``signs``, and computes the Hadamard transform, without its scale, of each ``together`` of them. That spreads
    an outlier over many inputs. The signs are random, because inputs of one sign would sum to an outlier.
    ``size``: number of inputs, a multiple of 32.

    Source: Ashkboos et al., "QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs", NeurIPS 2024.
    """

    def __init__(self, size: int) -> None:
        self.together = min(size & -size, _MOST_TOGETHER)
        self.signs = np.random.default_rng(0).choice(np.array([-1, 1], np.float32), size)

    def weights(self, weight: Array) -> Array:
        """Return the weights [size, out] that multiply transformed inputs."""
        values: Array = self.signs[:, None] * (weight / np.float32(self.together))
        apart = 1
        while apart < self.together:
            pairs = values.reshape(-1, 2, apart, values.shape[1])
            sums = pairs[:, 0] + pairs[:, 1]
            np.subtract(pairs[:, 0], pairs[:, 1], out=pairs[:, 1])
            pairs[:, 0] = sums
            apart *= 2
        return values

    def factor(self, factor: Array) -> Array:
        """Return the ``compensated.factor`` of the transformed inputs from that of the inputs. Inputs that it lacks are zero."""
        size = len(self.signs)
        wide = np.eye(size, dtype=np.float32)
        wide[: len(factor), : len(factor)] = factor
        upper = np.asarray(np.linalg.qr(self.weights(wide.T).T, mode="r"), np.float32)
        found: Array = upper * np.where(np.diagonal(upper) < 0, np.float32(-1), np.float32(1))[:, None]
        return found


class NativeCausalWriter:
    """Writes weight files of one model, with weights quantized by ``rounding``. It keeps quantized layers, because a search writes many
    files."""

    def __init__(
        self, architecture: CausalArchitecture, rounding: Rounding | None = None, cache: str = CACHES[0]
    ) -> None:
        """``cache``: type of keys and values, one of CACHES."""
        self._a = architecture
        self._cache = cache
        self._rounding = Rounding() if rounding is None else rounding
        self._quantized: dict[tuple[str, Bits | None, bool], _Matrix] = {}
        self._transforms: dict[int, Transform] = {}
        self._begin(None, frozenset())

    def save(self, path: Path, bits: Bits | None, *, kept: Collection[str] = ()) -> None:
        """Write a file with linear layers of ``bits`` (None: fp32).

        ``kept`` parts (``parts_of``) stay in fp32, or with INT4 in INT8.
        """
        a = self._a
        self._begin(bits, frozenset(kept))
        layers = [self._layer(i, layer) for i, layer in enumerate(a.layers)]
        tied = a.head is a.embedding and a.head_bias is None and self._bits_of(EMBEDDING, 8) == self._bits_of(HEAD, 8)
        model = {
            "layers": layers,
            "embedding": self._matrix(EMBEDDING, EMBEDDING, Linear(a.embedding.T), least=8),
            "head": self._matrix(HEAD, EMBEDDING if tied else HEAD, Linear(a.head.T, a.head_bias), least=8),
            "norm": self._norm("norm", a.norm),
            "positions": None if a.positions is None else self._keep("positions", a.positions),
            "longest": None if a.positions is None else len(a.positions),
            "ropes": [{"frequencies": rope.frequencies.tolist(), "scale": rope.scale} for rope in self._ropes],
            "vocabulary": len(a.head),
            "hidden": a.embedding.shape[1],
            "inner": a.layers[0].feed_forward.up.weight.shape[1],
            "heads": a.heads,
            "key_heads": a.key_heads,
            "head_size": a.head_size,
            "cache": self._cache,
            "scale": a.scale,
            "embedding_scale": a.embedding_scale,
            "attention_cap": a.attention_cap or 0.0,
            "logit_cap": a.logit_cap or 0.0,
        }
        write_weights(path, self._tensors, {"causal": model})
        self._begin(None, frozenset())

    def _begin(self, bits: Bits | None, kept: frozenset[str]) -> None:
        self._bits, self._kept = bits, kept
        self._tensors: dict[str, NDArray[Any]] = {}
        self._ropes: list[Rope] = []

    def _layer(self, i: int, layer: CausalLayer) -> dict[str, Any]:
        attention, feed = layer.attention, layer.feed_forward
        a, f = f"layers.{i}.attention", f"layers.{i}.feed_forward"
        up = feed.up if feed.gate is None else _by_turns(feed.gate, feed.up)
        return {
            "qkv": self._matrix(
                a, f"{a}.qkv", side_by_side(attention.query, attention.key, attention.value), f"{a}.query"
            ),
            "out": self._matrix(a, f"{a}.out", attention.out),
            "up": self._matrix(f, f"{f}.up", up),
            "down": self._matrix(f, f"{f}.down", feed.down),
            **{name: self._norm(f"layers.{i}.{name}", getattr(layer, name)) for name in _NORMS},
            "rope": self._rope(layer.rope),
            "window": layer.window or 0,
            "gated": feed.gate is not None,
            "parallel": layer.parallel,
            "activation": activation_of(feed.activation),
        }

    def _rope(self, rope: Rope | None) -> int:
        if rope is None:
            return -1
        for i, known in enumerate(self._ropes):
            if known.scale == rope.scale and np.array_equal(known.frequencies, rope.frequencies):
                return i
        self._ropes.append(rope)
        return len(self._ropes) - 1

    def _bits_of(self, part: str, least: Bits) -> Bits | None:
        if part in self._kept:
            return 8 if self._bits == 4 else None
        return None if self._bits is None else max(self._bits, least)

    def _matrix(self, part: str, name: str, layer: Linear, of: str = "", least: Bits = 4) -> dict[str, Any]:
        """Add a matrix. Those of one ``name`` are equal, and stored once. Its inputs are those of the layer ``of``."""
        bits = self._bits_of(part, least)
        inputs, outputs = layer.weight.shape
        key = (name, bits, self._rounding.compensates)
        matrix = _float(layer) if bits is None else self._quantized.get(key)
        if matrix is None:
            assert bits is not None
            matrix = self._quantized[key] = self._quantize(of or name, layer, bits)
        kept: dict[str, Any] = {
            each: self._keep(f"{name}.{each}.{matrix.kind}", array) for each, array in matrix.tensors.items()
        }
        if matrix.kind == "int8":
            transform = self._transform(inputs)
            kept["signs"] = self._keep(f"signs.{len(transform.signs)}", transform.signs)
            kept["together"] = transform.together
        return {"in": inputs, "out": outputs, "kind": matrix.kind, **kept}

    def _quantize(self, of: str, layer: Linear, bits: Bits) -> _Matrix:
        """Quantize a layer's weights. If the inputs of the layer ``of`` are known, the errors compensate each other."""
        if bits == 4:
            return _int4(layer, self._rounding.rounded(of, layer.weight, BLOCK, nibble_levels))
        transform = self._transform(len(layer.weight))
        weight = transform.weights(_padded(layer.weight))
        return _int8(layer, weight, self._rounding.rounded(of, weight, len(weight), int8_levels, transform.factor))

    def _transform(self, inputs: int) -> Transform:
        if inputs not in self._transforms:
            self._transforms[inputs] = Transform(-(-inputs // BLOCK) * BLOCK)
        return self._transforms[inputs]

    def _norm(self, name: str, norm: Norm | None) -> dict[str, Any] | None:
        if norm is None:
            return None
        beta = None if norm.beta is None else self._keep(f"{name}.beta", norm.beta)
        return {"gamma": self._keep(f"{name}.gamma", norm.gamma), "beta": beta, "epsilon": norm.epsilon}

    def _keep(self, name: str, array: NDArray[Any]) -> str:
        self._tensors[name] = array
        return name


def _float(layer: Linear) -> _Matrix:
    weight = _padded(layer.weight)
    return _Matrix("fp32", {"weight": _panels(weight, 1), "bias": _bias(layer, weight.shape[1])})


def _int8(layer: Linear, weight: Array, rounded: Rounded | None) -> _Matrix:
    """Return a layer's matrix of the transformed ``weight``. ``rounded``: its values; None: each is the nearest level."""
    if rounded is None:
        values, scales = quantize_channels(weight)
    else:
        values, scales = rounded.values, rounded.scales[0]
    tensors = {"weight": _panels(values, _FOUR), "scale": scales, "offset": 128 * values.sum(0, dtype=np.int32)}
    return _Matrix("int8", {**tensors, "bias": _bias(layer, weight.shape[1])})


def _int4(layer: Linear, rounded: Rounded | None) -> _Matrix:
    weight = _padded(layer.weight)
    if rounded is None:
        nibbles, steps, lows = quantize_nibbles(weight)
    else:
        nibbles = _padded(rounded.values.astype(np.uint8))
        steps, lows = (_bfloat16(_wide(each)) for each in (rounded.scales, rounded.minimums))
    tensors = {"weight": _packed(nibbles), "scale": _by_panel(steps), "low": _by_panel(lows)}
    return _Matrix("int4", {**tensors, "bias": _bias(layer, weight.shape[1])})


def _bias(layer: Linear, columns: int) -> Array:
    bias = np.zeros(columns, np.float32)
    if layer.bias is not None:
        bias[: len(layer.bias)] = layer.bias
    return bias


def _by_turns(gate: Linear, up: Linear) -> Linear:
    """Merge two layers: alternate the panels of both."""
    columns = -(-up.weight.shape[1] // COLUMNS) * COLUMNS

    def panels(parts: Sequence[Array]) -> Array:
        wide = [np.pad(part, ((0, 0), (0, columns - part.shape[1]))) for part in parts]
        turns: Array = np.stack([part.reshape(len(part), -1, COLUMNS) for part in wide], 2)
        return turns.reshape(len(wide[0]), 2 * columns)

    if gate.bias is None and up.bias is None:
        return Linear(panels([gate.weight, up.weight]))
    biases = [np.zeros(up.weight.shape[1], np.float32) if part.bias is None else part.bias for part in (gate, up)]
    return Linear(panels([gate.weight, up.weight]), panels([bias[None] for bias in biases])[0])


def _padded(weight: NDArray[Any]) -> NDArray[Any]:
    return np.pad(weight, [(0, -size % to) for size, to in zip(weight.shape, (BLOCK, COLUMNS))])


def _wide(values: Array) -> Array:
    """Add outputs of zeros to [blocks, out], as ``_padded`` does."""
    return np.pad(values, ((0, 0), (0, -values.shape[1] % COLUMNS)))


def quantize_channels(weight: Array) -> tuple[NDArray[np.int8], Array]:
    """Quantize [in, out] with a scale for each column."""
    levels = int8_levels(weight)
    return levels.round(weight).astype(np.int8), levels.scale


def quantize_nibbles(weight: Array) -> tuple[NDArray[np.uint8], NDArray[np.uint16], NDArray[np.uint16]]:
    """Quantize [in, out] to 0 ... 15 in blocks of 32 inputs.

    Returns values uint8 [in, out], and bfloat16 scales and minimums [in / 32, out]: a weight is value * scale + minimum. Each
    block starts from some ranges, of which it takes the one with the least squared error after a linear fit.
    """
    blocks = weight.reshape(-1, BLOCK, weight.shape[1])
    low, high = blocks.min(1), blocks.max(1)
    values = np.zeros(blocks.shape, np.uint8)
    scales, lows = np.zeros(low.shape, np.uint16), np.zeros(low.shape, np.uint16)
    least = np.full(low.shape, np.inf, np.float32)
    found = np.zeros(blocks.shape, np.float32)
    for shrink in _SHRINK:
        cut = (high - low) * np.float32((1 - shrink) / 2)
        begin, step = low + cut, (high - low - 2 * cut) / np.float32(15)
        for fits in range(2):
            if fits:
                begin, step = _fit(blocks, found, begin, step)
            bits, low_bits = _bfloat16(step), _bfloat16(begin)
            step, begin = _float32(bits), _float32(low_bits)
            safe = np.where(step == 0, np.float32(1), step)
            found = np.clip(np.rint((blocks - begin[:, None]) / safe[:, None]), 0, 15)
            error = np.square(found * step[:, None] + begin[:, None] - blocks).sum(1)
            better = error < least
            least = np.where(better, error, least)
            scales[better], lows[better] = bits[better], low_bits[better]
            values = np.where(better[:, None], found.astype(np.uint8), values)
    return values.reshape(weight.shape), scales, lows


def nibble_levels(block: Array) -> Levels:
    """Return ``int4_levels`` with scales and minimums in bfloat16.

    The scales of ``quantize_nibbles`` would be nearer. But if a checkpoint was trained from such 4-bit weights, they would give
    exactly those weights again, so compensated errors would undo the training.
    """
    levels = int4_levels(block)
    scale = _float32(_bfloat16(levels.scale))
    return Levels(scale, _float32(_bfloat16(np.rint(levels.minimum / levels.scale) * scale)), 0, 15)


def _fit(blocks: Array, values: Array, begin: Array, step: Array) -> tuple[Array, Array]:
    """Return the minimum and scale with which ``values`` are nearest to ``blocks``; the given ones if all are equally near."""
    mean, center = values.mean(1), blocks.mean(1)
    spread = np.square(values - mean[:, None]).sum(1)
    together = ((values - mean[:, None]) * (blocks - center[:, None])).sum(1)
    fits = (spread > 0) & (together > 0)
    slope = np.where(fits, together / np.where(fits, spread, 1), step)
    return np.where(fits, center - slope * mean, begin), slope


def _bfloat16(x: Array) -> NDArray[np.uint16]:
    """Round to the nearest bfloat16."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + np.uint32(0x8000)) >> np.uint32(16)).astype(np.uint16)


def _float32(bits: NDArray[np.uint16]) -> Array:
    """Return the values of bfloat16 ``bits``."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _panels(weight: NDArray[Any], together: int) -> NDArray[Any]:
    """Rearrange [in, out] to [out / 16][in / together][16][together]."""
    inputs, outputs = weight.shape
    return weight.reshape(inputs // together, together, outputs // COLUMNS, COLUMNS).transpose(2, 0, 3, 1)


def _by_panel(values: NDArray[Any]) -> NDArray[Any]:
    """Rearrange [blocks, out] to [out / 16][blocks][16]."""
    return values.reshape(len(values), -1, COLUMNS).transpose(1, 0, 2)


def _packed(values: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Rearrange 4-bit values [in, out] to [out / 16][in / 32][4][16][4] bytes of two each."""
    inputs, outputs = values.shape
    parts = values.reshape(inputs // BLOCK, 2, 4, 4, outputs // COLUMNS, COLUMNS)
    pairs: NDArray[np.uint8] = parts[:, 0] | (parts[:, 1] << np.uint8(4))
    return pairs.transpose(3, 0, 1, 4, 2)
