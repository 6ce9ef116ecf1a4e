"""Write the weights file for deploykit's own encoder engine (``runtime/engines/native/encoder.py``).

It needs no calibration: INT8 layers compute a scale for each row of activations.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from deploykit.errors import ExportError
from deploykit.graphs.encoders import Encoder, TextHead, read_encoder
from deploykit.graphs.export_options import Say
from deploykit.graphs.native_writer import NativeWriter
from deploykit.quantization.encoder import Quantizer
from deploykit.quantization.qdq import quantize_weight
from deploykit.runtime.engines import NATIVE_FILE


def write_native(
    model: Any, directory: Path, say: Say, *, typed: bool, token_head: str | None = None
) -> dict[str, Quantizer]:
    """Write the weights of ``model`` (see ``read_encoder``) with all layers in INT8.

    Return the quantizer by file; for a model that the engine does not run, return {} and print the reason.
    """
    try:
        encoder = read_encoder(model, typed=typed, token_head=token_head)
    except ExportError as error:
        say(f"nothing for the engine native: {error.message}")
        return {}
    quantizer = _NativeQuantizer(encoder, directory / NATIVE_FILE)
    quantizer.write(quantizer.parts)
    return {NATIVE_FILE: quantizer}


class _NativeQuantizer:
    """Writes the weights file. Its parts are layers; it needs no ranges."""

    def __init__(self, encoder: Encoder, path: Path) -> None:
        self._encoder, self._path = encoder, path
        self.parts = linear_parts(encoder)

    def write(self, parts: Collection[str]) -> None:
        save_native_encoder(self._path, self._encoder, parts)


def linear_parts(encoder: Encoder) -> list[str]:
    """Return the names of the linear layers that can be INT8."""
    return [f"{i}.{part}" for i in range(len(encoder.layers)) for part in ("qkv", "out", "up", "down")]


def save_native_encoder(path: Path, encoder: Encoder, int8: Collection[str]) -> None:
    """Write ``encoder`` with the ``linear_parts`` named in ``int8`` in INT8, the others in float32. The head is float32."""
    writer = NativeWriter(int8)
    e = encoder
    values, scales = quantize_weight(e.embedding, axis=0)
    head_size = e.embedding.shape[1] // e.heads
    by_text = e.head if isinstance(e.head, TextHead) else None
    last = e.head.dense if isinstance(e.head, TextHead) else e.head
    stack = {
        "hidden": e.embedding.shape[1],
        "vocabulary": len(e.embedding),
        "longest": len(e.positions) // e.types,
        "types": e.types,
        "padding": e.padding,
        "pre_norm": False,
        "embedding": writer.keep(values),
        "embedding_scale": writer.keep(scales),
        "positions": writer.keep(e.positions),
        "embedding_norm": writer.norm(e.embedding_norm),
        **writer.relative_bias(e.bias),
        "heads": e.heads,
        "head_size": head_size,
        "scale": head_size**-0.5,
        "output_scale": 1.0,
        "last_norm": None,
        "last": writer.linear("head", last),
        "layers": [
            {
                **writer.attention(f"{i}", a.query, a.key, a.value, a.out),
                **writer.feed_forward(f"{i}", layer.feed_forward),
                "attention_norm": writer.norm(layer.attention_norm),
                "feed_forward_norm": writer.norm(layer.feed_forward_norm),
            }
            for i, (layer, a) in enumerate((layer, layer.attention) for layer in e.layers)
        ],
    }
    head = by_text and {"out": writer.linear("head", by_text.out), "activation": by_text.activation}
    writer.save(path, {"encoder": stack, "head": head})
