"""Write an encoder-decoder transformer in optimum's layout, for tools that expect those files.

Source: optimum-onnx 0.1, ``ORTModelForSeq2SeqLM`` and ``optimum-cli export onnx --task text2text-generation-with-past``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto

from deploykit.graphs.architecture import Architecture, RelativeBias
from deploykit.graphs.seq2seq import decode, encode, side_by_side
from deploykit.graphs.standard_writer import StandardWriter
from deploykit.quantization.onnx_files import save_with_weights
from deploykit.quantization.qdq import Ranges

FILES = ("encoder_model", "decoder_model", "decoder_with_past_model")
"""Names of the graphs, without suffix: encoder; decoder of the first tokens; decoder of a token after others."""


def save_optimum(folder: Path, architecture: Architecture, ranges: Ranges | None = None) -> list[str]:
    """Write the three graphs, and their weights next to them. Returns the names of the graphs' files.

    The linear layers named in ``ranges`` are U8/S8; the files then end in ``_quantized.onnx``, as optimum's do.
    """
    suffix = "" if ranges is None else "_quantized"
    graphs = (
        _encoder(architecture, ranges),
        _decoder(architecture, ranges, past=False),
        _decoder(architecture, ranges, past=True),
    )
    names = [f"{name}{suffix}.onnx" for name in FILES]
    for name, model in zip(names, graphs):
        save_with_weights(model, folder / name)
    return names


@dataclass
class _Writer(StandardWriter):
    """Writes masks and biases from the inputs of optimum's graphs."""

    def mask_of(self, attention_mask: str) -> str:
        """Return bool [batch, 1, 1, tokens] of an int64 [batch, tokens]: True for tokens."""
        return self.op("Unsqueeze", self.op("Cast", attention_mask, to=TensorProto.BOOL), self.integers(1, 2))

    def at(self, x: str, index: int) -> str:
        """Return x[index]."""
        return self.op("Gather", x, self.constant(np.array(index, np.int64)), axis=0)

    def distance_bias(self, bias: RelativeBias, distance: str) -> str:
        """Return the bias [1, heads, queries, keys] of distances, int64 [queries, keys]."""
        return self._bias(bias, distance, batch_axis=False)

    def length(self, x: str, axis: int) -> str:
        """Return the size of an axis, int64 [1]."""
        return self.op("Shape", x, start=axis, end=axis + 1)


def _encoder(a: Architecture, ranges: Ranges | None) -> onnx.ModelProto:
    g = _Writer("encoder", a, ranges, scheme="u8s8")
    ids = g.input("input_ids", TensorProto.INT64, ["batch_size", "encoder_sequence_length"])
    visible = g.mask_of(g.input("attention_mask", TensorProto.INT64, ["batch_size", "encoder_sequence_length"]))
    length = g.length(ids, 1)
    hidden = encode(g, ids, visible, length)
    g.op("Identity", hidden, output="last_hidden_state")
    g.output("last_hidden_state", ["batch_size", "encoder_sequence_length", a.encoder_embedding.shape[1]])
    return g.finish().model


def _decoder(a: Architecture, ranges: Ranges | None, *, past: bool) -> onnx.ModelProto:
    """Build the decoder of the first tokens, or of tokens with a ``past``."""
    g = _Writer("decoder_with_past" if past else "decoder", a, ranges, scheme="u8s8")
    readable = g.mask_of(
        g.input("encoder_attention_mask", TensorProto.INT64, ["batch_size", "encoder_sequence_length"])
    )
    ids = g.input("input_ids", TensorProto.INT64, ["batch_size", "decoder_sequence_length"])

    def caches(i: int, part: str, positions: str) -> tuple[str, str]:
        shape: list[int | str] = ["batch_size", a.heads, positions, a.head_size]
        key, value = (
            g.input(f"past_key_values.{i}.{part}.{kind}", TensorProto.FLOAT, shape) for kind in ("key", "value")
        )
        return key, value

    def give(i: int, part: str, positions: str, tensors: tuple[str, str]) -> None:
        for kind, tensor in zip(("key", "value"), tensors):
            g.op("Identity", tensor, output=f"present.{i}.{part}.{kind}")
            g.output(f"present.{i}.{part}.{kind}", ["batch_size", a.heads, positions, a.head_size])

    layers = range(len(a.decoder_layers))
    own: list[tuple[str, str]] = []
    cross: list[tuple[str, str]] = []
    if past:  # optimum passes caches in this order
        for i in layers:
            own.append(caches(i, "decoder", "past_decoder_sequence_length"))
            cross.append(caches(i, "encoder", "encoder_sequence_length"))
    else:
        width: int = a.encoder_embedding.shape[1]
        encoded = g.input("encoder_hidden_states", TensorProto.FLOAT, ["batch_size", "encoder_sequence_length", width])
        parts = [part for layer in a.decoder_layers for part in (layer.cross.key, layer.cross.value)]
        packed = g.op(
            "Reshape", g.linear(encoded, side_by_side(*parts), "cross"), g.integers(0, 0, len(parts), a.heads, -1)
        )
        packed = g.op("Transpose", packed, perm=[2, 0, 3, 1, 4])
        cross = [(g.at(packed, 2 * i), g.at(packed, 2 * i + 1)) for i in layers]
    begin = g.length(own[0][0], 2) if past else g.integers(0)
    total = g.op("Add", begin, g.length(ids, 1))
    keys = g.positions(g.op("Squeeze", total))
    queries = g.op("Slice", keys, begin, total, g.integers(0))
    rows, columns = g.op("Unsqueeze", queries, g.integers(1)), g.op("Unsqueeze", keys, g.integers(0))
    causal = g.op("LessOrEqual", columns, rows)
    hidden = g.embed(ids, a.decoder_embedding, a.embedding_scale)
    if a.decoder_positions is not None:
        hidden = g.op("Add", hidden, g.op("Gather", g.constant(a.decoder_positions), queries))
    if a.decoder_embedding_norm is not None:
        hidden = g.norm(hidden, a.decoder_embedding_norm)
    bias = g.distance_bias(a.decoder_bias, g.op("Sub", columns, rows)) if a.decoder_bias is not None else ""

    def self_attention(i: int, packed: str) -> str:
        query, key, value = (g.by_head(tensor, a.heads) for tensor in g.split(packed, num_outputs=3))
        if past:
            key, value = (g.op("Concat", old, new, axis=2) for old, new in zip(own[i], (key, value)))
        give(i, "decoder", "total_decoder_sequence_length", (key, value))
        if not past:
            give(i, "encoder", "encoder_sequence_length", cross[i])
        return g.attend(query, key, value, causal, bias, a.scale)

    def cross_attention(i: int, query: str) -> str:
        return g.attend(g.by_head(query, a.heads), *cross[i], readable, "", a.scale)

    hidden = decode(g, hidden, self_attention, cross_attention)
    if a.output_scale != 1.0:
        hidden = g.op("Mul", hidden, g.scalar(a.output_scale))
    g.activations["decoder.projection"] = hidden
    logits = g.op("MatMul", hidden, g.constant(a.projection.T))
    if a.output_bias is not None and a.output_bias.any():
        logits = g.op("Add", logits, g.constant(a.output_bias))
    g.op("Identity", logits, output="logits")
    g.output("logits", ["batch_size", "decoder_sequence_length", a.vocabulary])
    g.outputs.insert(0, g.outputs.pop())  # optimum reads the outputs in order
    return g.finish().model
