"""The file of weights that deploykit's own engine for classifiers reads (``runtime/engines/native/classifier.py``).

It needs no calibration: INT8 layers have a scale for each row of activations, found as it comes.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from deploykit.graphs.native_writer import NativeWriter
from deploykit.quantization.qdq import quantize_weight
from deploykit.tasks.classification.encoders import EncoderClassifier


def linear_parts(encoder: EncoderClassifier) -> list[str]:
    """The linear layers that can be INT8, by name."""
    return [f"{i}.{part}" for i in range(len(encoder.layers)) for part in ("qkv", "out", "up", "down")]


def save_native_classifier(path: Path, encoder: EncoderClassifier, int8: Collection[str]) -> None:
    """Write ``encoder`` with the ``linear_parts`` named in ``int8`` in INT8, the others in float32. The head is float32."""
    writer = NativeWriter(int8)
    e = encoder
    values, scales = quantize_weight(e.embedding, axis=0)
    head_size = e.embedding.shape[1] // e.heads
    stack = {
        "hidden": e.embedding.shape[1],
        "vocabulary": len(e.embedding),
        "longest": len(e.positions) // e.types,
        "types": e.types,
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
        "last": writer.linear("head", e.dense),
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
    writer.save(path, {"encoder": stack, "head": {"out": writer.linear("head", e.out), "activation": e.activation}})
