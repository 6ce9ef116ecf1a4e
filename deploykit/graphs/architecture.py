"""An encoder-decoder transformer as plain arrays: the link between a family's checkpoint reader and the graph writer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]


@dataclass(frozen=True)
class Linear:
    """x @ weight + bias; ``weight`` is float32 [in, out], ``bias`` is [out] or None."""

    weight: Array
    bias: Array | None = None


@dataclass(frozen=True)
class Norm:
    """A layer norm; without ``beta``, a root-mean-square norm, which subtracts no mean."""

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
    """down(activation(up(x))), or down(activation(gate(x)) * up(x)) with a ``gate``."""

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
    """Everything that determines the function of an encoder-decoder transformer.

    - ``heads`` of ``head_size`` are the decoder's, which multiplies its attention scores by ``scale``.
    - ``pre_norm``: norms come before each block, and once at the end; otherwise after each block.
    - Embeddings and ``projection`` are [vocabulary, hidden]. Where a family shares them they are equal, and stored once.
    - ``positions`` are [length, hidden], row 0 for the first token; None where the family has none.
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
