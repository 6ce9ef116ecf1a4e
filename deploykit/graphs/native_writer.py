"""Write the weights file of the engine ``native``.

Linear layers that have ranges become INT8, with a scale for each row of activations and each column of weights; the
ranges themselves are not used. Other layers stay float32. Embeddings are S8 with a scale for each token. The format is
safetensors, with every tensor padded to 64 bytes.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deploykit.graphs.architecture import Architecture, Array, FeedForward, Linear, Norm, RelativeBias
from deploykit.graphs.seq2seq import side_by_side
from deploykit.graphs.writer import activation_of
from deploykit.quantization.qdq import Ranges, quantize_weight
from deploykit.runtime.engines.native.weights import ALIGNMENT, FORMAT, PANEL

_ZERO = 128  # the engine adds it to S8 activations, to make them unsigned
_TYPES = {"int8": "I8", "uint8": "U8", "uint16": "U16", "int32": "I32", "float32": "F32"}


def save_native(path: Path, architecture: Architecture, ranges: Ranges) -> None:
    """Write ``architecture``, with the layers that have ``ranges`` (by the names of ``build_encoder``) in INT8."""
    writer = NativeWriter(ranges)
    a = architecture
    stacks = {
        "encoder": {
            **writer.stack(a, a.encoder_embedding, a.encoder_positions, a.encoder_embedding_norm, a.encoder_bias),
            "heads": a.encoder_heads,
            "head_size": a.encoder_layers[0].attention.query.weight.shape[1] // a.encoder_heads,
            "scale": a.encoder_scale,
            "output_scale": 1.0,
            "last_norm": writer.norm(a.encoder_norm),
            "last": writer.linear("cross", side_by_side(*(
                part for layer in a.decoder_layers for part in (layer.cross.key, layer.cross.value)
            ))),
            "layers": [
                {
                    **writer.attention(f"encoder.{i}.self", layer.attention.query, layer.attention.key,
                                       layer.attention.value, layer.attention.out),
                    **writer.feed_forward(f"encoder.{i}.feed_forward", layer.feed_forward),
                    "attention_norm": writer.norm(layer.attention_norm),
                    "feed_forward_norm": writer.norm(layer.feed_forward_norm),
                }
                for i, layer in enumerate(a.encoder_layers)
            ],
        },
        "decoder": {
            **writer.stack(a, a.decoder_embedding, a.decoder_positions, a.decoder_embedding_norm, a.decoder_bias),
            "heads": a.heads,
            "head_size": a.head_size,
            "scale": a.scale,
            "output_scale": a.output_scale,
            "last_norm": writer.norm(a.decoder_norm),
            "last": writer.projection("decoder.projection", a.projection, a.output_bias),
            "layers": [
                {
                    **writer.attention(f"decoder.{i}.self", layer.attention.query, layer.attention.key,
                                       layer.attention.value, layer.attention.out),
                    "cross_query": writer.linear(f"decoder.{i}.cross.query", layer.cross.query),
                    "cross_out": writer.linear(f"decoder.{i}.cross.out", layer.cross.out),
                    **writer.feed_forward(f"decoder.{i}.feed_forward", layer.feed_forward),
                    "attention_norm": writer.norm(layer.attention_norm),
                    "cross_norm": writer.norm(layer.cross_norm),
                    "feed_forward_norm": writer.norm(layer.feed_forward_norm),
                }
                for i, layer in enumerate(a.decoder_layers)
            ],
        },
    }  # fmt: skip
    writer.save(path, stacks)


def write_weights(path: Path, tensors: Mapping[str, NDArray[Any]], model: Mapping[str, Any]) -> None:
    """Write a weight file: ``tensors`` by name, each at a multiple of 64 bytes, and the record ``model``."""
    header: dict[str, Any] = {"__metadata__": {"format": FORMAT, "model": json.dumps(model)}}
    offset = 0
    for name, array in tensors.items():
        end = offset + array.nbytes
        header[name] = {"dtype": _TYPES[array.dtype.name], "shape": list(array.shape), "data_offsets": [offset, end]}
        offset = end + -end % ALIGNMENT
    text = json.dumps(header).encode()
    text += b" " * (-(len(text) + 8) % ALIGNMENT)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for array in tensors.values():
            file.write(array.tobytes() + bytes(-array.nbytes % ALIGNMENT))


class NativeWriter:
    """Collects tensors by name; equal tensors are stored once. The linear layers named in ``int8`` become INT8."""

    def __init__(self, int8: Collection[str]) -> None:
        self._int8_layers = int8
        self._tensors: dict[str, NDArray[Any]] = {}

    def save(self, path: Path, stacks: dict[str, Any]) -> None:
        write_weights(path, self._tensors, stacks)

    def stack(
        self, a: Architecture, embedding: Array, positions: Array | None, norm: Norm | None, bias: RelativeBias | None
    ) -> dict[str, Any]:
        values, scales = quantize_weight(embedding, axis=0)
        return {
            "hidden": a.hidden,
            "vocabulary": len(embedding),
            "longest": None if positions is None else len(positions),
            "pre_norm": a.pre_norm,
            "embedding": self.keep(_panels(values.T)),
            "embedding_scale": self.keep(scales.reshape(-1) * np.float32(a.embedding_scale)),
            "positions": None if positions is None else self.keep(positions),
            "embedding_norm": self.norm(norm),
            **self.relative_bias(bias),
        }

    def relative_bias(self, bias: RelativeBias | None) -> dict[str, Any]:
        return {
            "bias": None if bias is None else self.keep(bias.by_distance),
            "distances": 0 if bias is None else bias.by_distance.shape[1],
            "zero_distance": 0 if bias is None else bias.zero,
        }

    def attention(self, name: str, query: Linear, key: Linear, value: Linear, out: Linear) -> dict[str, Any]:
        return {
            "qkv": self.linear(f"{name}.qkv", side_by_side(query, key, value)),
            "out": self.linear(f"{name}.out", out),
        }

    def feed_forward(self, name: str, part: FeedForward) -> dict[str, Any]:
        return {
            "up": self.linear(f"{name}.up", part.up),
            "gate": None if part.gate is None else self.linear(f"{name}.gate", part.gate),
            "down": self.linear(f"{name}.down", part.down),
            "activation": activation_of(part.activation),
        }

    def norm(self, norm: Norm | None) -> dict[str, Any] | None:
        if norm is None:
            return None
        beta = None if norm.beta is None else self.keep(norm.beta)
        return {"gamma": self.keep(norm.gamma), "beta": beta, "epsilon": norm.epsilon}

    def linear(self, name: str, layer: Linear) -> dict[str, Any]:
        if name not in self._int8_layers:
            return self._float(layer.weight, layer.bias)
        values, scales = quantize_weight(layer.weight, axis=1)
        return self._int8(values, scales.reshape(-1), layer.bias)

    def projection(self, name: str, table: Array, bias: Array | None) -> dict[str, Any]:
        """Return the record of the projection. If it equals the embedding, both share one tensor with a scale per
        token."""
        if name not in self._int8_layers:
            return self._float(table.T, bias)
        values, scales = quantize_weight(table, axis=0)
        return self._int8(values.T, scales.reshape(-1), bias)

    def _float(self, weight: Array, bias: Array | None) -> dict[str, Any]:
        inputs, outputs = weight.shape
        panels = _filled(weight, 1, PANEL).reshape(inputs, -1, PANEL).transpose(1, 0, 2)
        return {"weight": self.keep(panels), "bias": self._bias(bias, outputs), "in": inputs, "out": outputs}

    def _int8(self, values: NDArray[np.int8], scales: Array, bias: Array | None) -> dict[str, Any]:
        inputs, outputs = values.shape
        offset = values.sum(axis=0, dtype=np.int32) * np.int32(_ZERO)
        return {
            "weight": self.keep(_panels(values)),
            "scale": self.keep(_filled(scales, 0, PANEL)),
            "offset": self.keep(_filled(offset, 0, PANEL)),
            "bias": self._bias(bias, outputs),
            "in": inputs,
            "out": outputs,
        }

    def _bias(self, bias: Array | None, outputs: int) -> str:
        return self.keep(_filled(np.zeros(outputs, np.float32) if bias is None else bias.reshape(-1), 0, PANEL))

    def keep(self, array: NDArray[Any]) -> str:
        flat = np.ascontiguousarray(array).reshape(-1)
        flat = _filled(flat, 0, ALIGNMENT // flat.itemsize)
        name = hashlib.sha256(flat.tobytes() + flat.dtype.name.encode()).hexdigest()[:24]
        self._tensors.setdefault(name, flat)
        return name


def _filled(array: NDArray[Any], axis: int, multiple: int) -> NDArray[Any]:
    """Pad ``array`` with zeros along ``axis`` to a multiple of ``multiple``."""
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, -array.shape[axis] % multiple)
    return np.pad(array, widths)


def _panels(values: NDArray[np.int8]) -> NDArray[np.int8]:
    """Rearrange [in, out] to [out / 64][in / 4][64][4], padded with zeros."""
    values = _filled(_filled(values, 0, 4), 1, PANEL)
    inputs, outputs = values.shape
    return values.reshape(inputs // 4, 4, outputs // PANEL, PANEL).transpose(2, 0, 3, 1)
