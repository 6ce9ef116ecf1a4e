"""Write an encoder-decoder transformer as optimum lays it out, for tools that expect those files.

Source: optimum-onnx 0.1, ``ORTModelForSeq2SeqLM`` and ``optimum-cli export onnx --task text2text-generation-with-past``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto

from deploykit.graphs.architecture import Architecture, Attention, RelativeBias
from deploykit.graphs.onnx_export import HALF_OPSET
from deploykit.graphs.seq2seq import side_by_side
from deploykit.graphs.standard_writer import StandardWriter
from deploykit.quantization.qdq import Ranges, quantize

FILES = ("encoder_model", "decoder_model", "decoder_with_past_model")
"""Names of the graphs, without suffix: encoder; decoder of the first tokens; decoder of a token after others."""
_IR = 9


def save_optimum(folder: Path, architecture: Architecture, ranges: Ranges | None = None) -> list[str]:
    """Write the three graphs, and their weights beside them. Returns the names of the graphs' files.

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
        weights = f"{name}_data"
        (folder / weights).unlink(missing_ok=True)  # onnx appends to a file that exists
        onnx.save(model, folder / name, save_as_external_data=True, location=weights, size_threshold=1024)
    return names


@dataclass
class _Writer(StandardWriter):
    """Writes attention over several tokens at once, with caches that grow by these tokens."""

    def build(self) -> onnx.ModelProto:
        model = self.model({"": HALF_OPSET}, _IR)
        if self.ranges is not None:
            ranges = {tensor: self.ranges[name] for name, tensor in self.activations.items() if name in self.ranges}
            model, _ = quantize(model, ranges, "u8s8", embeddings=False)
        return model

    def by_head(self, x: str, heads: int) -> str:
        """Reshape [batch, tokens, heads x head size] to [batch, heads, tokens, head size]."""
        return self.op("Transpose", self.op("Reshape", x, self.integers(0, 0, heads, -1)), perm=[0, 2, 1, 3])

    def attend(self, query: str, key: str, value: str, visible: str, bias: str, scale: float) -> str:
        attended = self._attention(query, key, value, visible, bias, scale)
        return self.op("Reshape", self.op("Transpose", attended, perm=[0, 2, 1, 3]), self.integers(0, 0, -1))

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
    g = _Writer("encoder", a, ranges)
    ids = g.input("input_ids", TensorProto.INT64, ["batch_size", "encoder_sequence_length"])
    visible = g.mask_of(g.input("attention_mask", TensorProto.INT64, ["batch_size", "encoder_sequence_length"]))
    length = g.length(ids, 1)
    hidden = g.embed(ids, a.encoder_embedding, a.embedding_scale)
    if a.encoder_positions is not None:
        zero = g.integers(0)
        hidden = g.op("Add", hidden, g.op("Slice", g.constant(a.encoder_positions), zero, length, zero))
    if a.encoder_embedding_norm is not None:
        hidden = g.norm(hidden, a.encoder_embedding_norm)
    bias = g.encoder_bias(a.encoder_bias, length) if a.encoder_bias is not None else ""

    def attention(name: str, part: Attention) -> Callable[[str], str]:
        def block(x: str) -> str:
            packed = g.split(g.linear(x, side_by_side(part.query, part.key, part.value), f"{name}.qkv"), num_outputs=3)
            query, key, value = (g.by_head(tensor, a.encoder_heads) for tensor in packed)
            return g.linear(g.attend(query, key, value, visible, bias, a.encoder_scale), part.out, f"{name}.out")

        return block

    blocks = []
    for i, layer in enumerate(a.encoder_layers):
        blocks.append((attention(f"encoder.{i}.self", layer.attention), layer.attention_norm))
        blocks.append((g.feed_forward(f"encoder.{i}.feed_forward", layer.feed_forward), layer.feed_forward_norm))
    hidden = g.residual(hidden, blocks, a.encoder_norm, pre_norm=a.pre_norm)
    g.op("Identity", hidden, output="last_hidden_state")
    g.output("last_hidden_state", ["batch_size", "encoder_sequence_length", a.encoder_embedding.shape[1]])
    return g.build()


def _decoder(a: Architecture, ranges: Ranges | None, *, past: bool) -> onnx.ModelProto:
    """Build the decoder of the first tokens, or of tokens with a ``past``."""
    g = _Writer("decoder_with_past" if past else "decoder", a, ranges)
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

    def self_attention(i: int, part: Attention) -> Callable[[str], str]:
        def block(x: str) -> str:
            linear = g.linear(x, side_by_side(part.query, part.key, part.value), f"decoder.{i}.self.qkv")
            query, key, value = (g.by_head(tensor, a.heads) for tensor in g.split(linear, num_outputs=3))
            if past:
                key, value = (g.op("Concat", old, new, axis=2) for old, new in zip(own[i], (key, value)))
            give(i, "decoder", "total_decoder_sequence_length", (key, value))
            if not past:
                give(i, "encoder", "encoder_sequence_length", cross[i])
            return g.linear(g.attend(query, key, value, causal, bias, a.scale), part.out, f"decoder.{i}.self.out")

        return block

    def cross_attention(i: int, part: Attention) -> Callable[[str], str]:
        def block(x: str) -> str:
            query = g.by_head(g.linear(x, part.query, f"decoder.{i}.cross.query"), a.heads)
            return g.linear(g.attend(query, *cross[i], readable, "", a.scale), part.out, f"decoder.{i}.cross.out")

        return block

    blocks = []
    for i, layer in enumerate(a.decoder_layers):
        blocks.append((self_attention(i, layer.attention), layer.attention_norm))
        blocks.append((cross_attention(i, layer.cross), layer.cross_norm))
        blocks.append((g.feed_forward(f"decoder.{i}.feed_forward", layer.feed_forward), layer.feed_forward_norm))
    hidden = g.residual(hidden, blocks, a.decoder_norm, pre_norm=a.pre_norm)
    if a.output_scale != 1.0:
        hidden = g.op("Mul", hidden, g.scalar(a.output_scale))
    g.activations["decoder.projection"] = hidden
    logits = g.op("MatMul", hidden, g.constant(a.projection.T))
    if a.output_bias is not None and a.output_bias.any():
        logits = g.op("Add", logits, g.constant(a.output_bias))
    g.op("Identity", logits, output="logits")
    g.output("logits", ["batch_size", "decoder_sequence_length", a.vocabulary])
    g.outputs.insert(0, g.outputs.pop())  # optimum reads the outputs in order
    return g.build()
