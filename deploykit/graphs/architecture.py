"""Represent an encoder-decoder transformer as plain arrays, which families read and graph writers write."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]


@dataclass(frozen=True)
class Linear:
    """A linear layer x @ weight + bias; ``weight`` is float32 [in, out], ``bias`` is [out] or None."""

    weight: Array
    bias: Array | None = None


@dataclass(frozen=True)
class Norm:
    """A layer norm, or without ``beta`` a root-mean-square norm, which subtracts no mean."""

    gamma: Array
    beta: Array | None
    epsilon: float


@dataclass(frozen=True)
class Attention:
    query: Linear
    key: Linear
    value: Linear
    out: Linear


@dataclass(frozen=True)
class FeedForward:
    """A feed-forward block: down(activation(up(x))), or with a ``gate`` down(activation(gate(x)) * up(x))."""

    up: Linear
    down: Linear
    activation: str
    gate: Linear | None = None


@dataclass(frozen=True)
class EncoderLayer:
    attention: Attention
    attention_norm: Norm
    feed_forward: FeedForward
    feed_forward_norm: Norm


@dataclass(frozen=True)
class DecoderLayer:
    attention: Attention
    attention_norm: Norm
    cross: Attention
    cross_norm: Norm
    feed_forward: FeedForward
    feed_forward_norm: Norm


@dataclass(frozen=True)
class RelativeBias:
    """Attention biases that depend only on the distance between positions (T5).

    ``by_distance`` is float32 [heads, distances]. Column ``i`` is for a key position minus query position of ``i -
    zero``.
    """

    by_distance: Array
    zero: int


@dataclass(frozen=True)
class Architecture:
    """All weights and settings of an encoder-decoder transformer.

    - ``heads`` of ``head_size`` are the decoder's, which multiplies its attention scores by ``scale``.
    - ``pre_norm``: norms come before each block, and once at the end; otherwise after each block.
    - Embeddings and ``projection`` are [vocabulary, hidden]. If a family ties them they are equal, and stored once.
    - ``positions`` are [length, hidden], row 0 for the first token; None if the family has none.
    - Logits are (decoder output x ``output_scale``) @ projection.T + ``output_bias``.
    """

    encoder_heads: int
    heads: int
    head_size: int
    encoder_scale: float
    scale: float
    pre_norm: bool
    encoder_embedding: Array
    decoder_embedding: Array
    projection: Array
    embedding_scale: float
    encoder_layers: tuple[EncoderLayer, ...]
    decoder_layers: tuple[DecoderLayer, ...]
    encoder_positions: Array | None = None
    decoder_positions: Array | None = None
    encoder_embedding_norm: Norm | None = None
    decoder_embedding_norm: Norm | None = None
    encoder_norm: Norm | None = None
    decoder_norm: Norm | None = None
    encoder_bias: RelativeBias | None = None
    decoder_bias: RelativeBias | None = None
    output_bias: Array | None = None
    output_scale: float = 1.0

    @property
    def hidden(self) -> int:
        return self.projection.shape[1]

    @property
    def vocabulary(self) -> int:
        return self.projection.shape[0]


HEAD_MULTIPLE = 8
"""ONNX Runtime's attention takes heads of a multiple of this size."""


def pad_heads(a: Architecture) -> Architecture:
    """Pad the decoder's heads with zeros to a multiple of 8, as ONNX Runtime's attention requires.

    The result is the same: scores and values of the new dimensions are 0, and ``scale`` is unchanged.
    """
    wide = -(-a.head_size // HEAD_MULTIPLE) * HEAD_MULTIPLE
    if wide == a.head_size:
        return a

    def columns(layer: Linear) -> Linear:
        bias = None if layer.bias is None else _widen(layer.bias[None], a.heads, wide)[0]
        return Linear(_widen(layer.weight, a.heads, wide), bias)

    def attention(x: Attention) -> Attention:
        out = Linear(np.ascontiguousarray(_widen(x.out.weight.T, a.heads, wide).T), x.out.bias)
        return Attention(columns(x.query), columns(x.key), columns(x.value), out)

    layers = tuple(
        dataclasses.replace(layer, attention=attention(layer.attention), cross=attention(layer.cross))
        for layer in a.decoder_layers
    )
    return dataclasses.replace(a, head_size=wide, decoder_layers=layers)


def _widen(rows: Array, heads: int, wide: int) -> Array:
    """Pad each head of [n, heads x size] with zeros at its end: [n, heads x wide]."""
    parts = rows.reshape(len(rows), heads, -1)
    zeros = ((0, 0), (0, 0), (0, wide - parts.shape[2]))
    return np.ascontiguousarray(np.pad(parts, zeros).reshape(len(rows), heads * wide))


class Weights:
    """A state dict as float32 arrays by name, with methods that build layers from names."""

    def __init__(self, arrays: Mapping[str, Array]) -> None:
        self._arrays = arrays

    def __getitem__(self, name: str) -> Array:
        return self._arrays[name]

    def get(self, name: str) -> Array | None:
        return self._arrays.get(name)

    def linear(self, name: str) -> Linear:
        """Return the linear layer ``name``, transposed: PyTorch stores [out, in]."""
        return Linear(np.ascontiguousarray(self[f"{name}.weight"].T), self.get(f"{name}.bias"))

    def norm(self, name: str, epsilon: float) -> Norm:
        return Norm(self[f"{name}.weight"], self.get(f"{name}.bias"), epsilon)

    def attention(self, name: str, parts: Sequence[str]) -> Attention:
        """Return the attention block ``name``. ``parts`` name its query, key, value and output layers."""
        query, key, value, out = (self.linear(f"{name}.{part}") for part in parts)
        return Attention(query, key, value, out)
