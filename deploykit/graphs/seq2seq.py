"""Build encoder and decoder-step graphs of an encoder-decoder transformer, node by node.

The encoder computes the cross-attention keys and values of all decoder layers at once. The decoder takes one token of
each row, whose past is in caches; rows may be at different positions. Both graphs share one copy of the embedding.

There are two writers: for ONNX Runtime (``onnxruntime_writer``), and in standard ONNX (``standard_writer``).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
from onnx import TensorProto, helper

from deploykit.errors import ExportError
from deploykit.graphs.architecture import Architecture, Attention, Linear
from deploykit.graphs.onnxruntime_writer import OnnxRuntimeWriter
from deploykit.graphs.standard_writer import StandardWriter
from deploykit.graphs.writer import ACTIVATIONS, Graph, Writer
from deploykit.quantization.qdq import Ranges

_SHARED_ALIGNMENT = 4096  # ONNX Runtime maps external data page by page

Standard = Literal["fp32", "fp16", "bf16"]
"""Type of all computation in a standard ONNX graph."""
_TYPES: dict[Standard, int] = {
    "fp32": TensorProto.FLOAT,
    "fp16": TensorProto.FLOAT16,
    "bf16": TensorProto.BFLOAT16,
}


def build_encoder(
    architecture: Architecture, ranges: Ranges | None = None, *, standard: Standard | None = None
) -> Graph:
    """Build the encoder graph.

    Inputs: input_ids int64 [batch, source]; lengths int32 [batch], the tokens of each row, the rest being padding.
    Output: cross, float32, keys and values of each decoder layer in turn: [batch, source, 2 x decoder layers x heads x
    head size] for ONNX Runtime, [batch, 2 x decoder layers, heads, source, head size] in ``standard`` ONNX.

    The linear layers named in ``ranges`` are INT8: weights symmetric, with a scale per channel; activations with a
    fixed scale, symmetric in standard ONNX. For ONNX Runtime, caches and cross are INT8 if ``cache_names`` have ranges;
    their scales are in the graph's metadata.
    """
    a, g = architecture, _writer("encoder", architecture, ranges, standard)
    ids = g.input("input_ids", TensorProto.INT64, ["batch", "source"])
    lengths = g.input("lengths", TensorProto.INT32, ["batch"])
    length = g.op("Shape", ids, start=1, end=2)
    mask = g.padding_mask(lengths, length)
    hidden = encode(g, ids, mask, length)
    parts = [part for layer in a.decoder_layers for part in (layer.cross.key, layer.cross.value)]
    g.give_cross(hidden, side_by_side(*parts))
    return g.finish()


def encode(g: Writer, ids: str, mask: str, length: str) -> str:
    """Write the encoder. Returns its hidden states, [batch, source, hidden].

    Args:
        ids: int64 [batch, source].
        mask: of the tokens, as ``g.encoder_attention`` takes it.
        length: int64 [1], the size of ``source``.
    """
    a = g.architecture
    hidden = g.embed(ids, a.encoder_embedding, a.embedding_scale)
    if a.encoder_positions is not None:
        zero = g.integers(0)
        hidden = g.op("Add", hidden, g.op("Slice", g.constant(a.encoder_positions), zero, length, zero))
    if a.encoder_embedding_norm is not None:
        hidden = g.norm(hidden, a.encoder_embedding_norm)
    bias = g.encoder_bias(a.encoder_bias, length) if a.encoder_bias is not None else ""

    def self_attention(name: str, part: Attention) -> Callable[[str], str]:
        def block(x: str) -> str:
            packed = g.linear(x, side_by_side(part.query, part.key, part.value), f"{name}.qkv")
            return g.linear(g.encoder_attention(packed, mask, bias), part.out, f"{name}.out")

        return block

    blocks = []
    for i, layer in enumerate(a.encoder_layers):
        blocks.append((self_attention(f"encoder.{i}.self", layer.attention), layer.attention_norm))
        blocks.append((g.feed_forward(f"encoder.{i}.feed_forward", layer.feed_forward), layer.feed_forward_norm))
    return g.residual(hidden, blocks, a.encoder_norm, pre_norm=a.pre_norm)


def decode(
    g: Writer, hidden: str, self_attention: Callable[[int, str], str], cross_attention: Callable[[int, str], str]
) -> str:
    """Write the decoder's layers. Returns hidden states in the shape of ``hidden``.

    ``self_attention`` takes a layer's number and its packed queries, keys and values; ``cross_attention`` its queries.
    """
    a = g.architecture

    def self_block(i: int, part: Attention) -> Callable[[str], str]:
        def block(x: str) -> str:
            packed = g.linear(x, side_by_side(part.query, part.key, part.value), f"decoder.{i}.self.qkv")
            return g.linear(self_attention(i, packed), part.out, f"decoder.{i}.self.out")

        return block

    def cross_block(i: int, part: Attention) -> Callable[[str], str]:
        def block(x: str) -> str:
            query = g.linear(x, part.query, f"decoder.{i}.cross.query")
            return g.linear(cross_attention(i, query), part.out, f"decoder.{i}.cross.out")

        return block

    blocks = []
    for i, layer in enumerate(a.decoder_layers):
        blocks.append((self_block(i, layer.attention), layer.attention_norm))
        blocks.append((cross_block(i, layer.cross), layer.cross_norm))
        blocks.append((g.feed_forward(f"decoder.{i}.feed_forward", layer.feed_forward), layer.feed_forward_norm))
    return g.residual(hidden, blocks, a.decoder_norm, pre_norm=a.pre_norm)


def build_decoder(
    architecture: Architecture, ranges: Ranges | None = None, *, standard: Standard | None = None
) -> Graph:
    """Build the graph of one decoder step. ``ranges`` and ``standard`` are those of ``build_encoder``.

    Inputs: input_ids int64 [rows, 1]; past_lengths int32 [rows]; past.L.key and past.L.value [rows, heads, target, head
    size], caches with room for ``target`` positions, at least past_lengths + 1; cross.L.key and .value [rows, heads,
    source, head size], from the encoder's output; source_last int32 [rows], the position of each row's last source
    token.

    Outputs: logits float32 [rows, vocabulary]; present.L.key and .value, the caches with this token's keys and values.
    Cache positions after a row's own tokens are ignored; in standard ONNX they must be finite.

    The graph for ONNX Runtime has more inputs: total int32 [], the positions of the past caches in use; source_total
    int32 []; cross.L.last_key and .last_value float32 [rows, 1, heads x head size], those of each row's last source
    token. Its outputs must be bound to the caches themselves (there are also cross_present.L.key and .value).
    """
    a, g = architecture, _writer("decoder", architecture, ranges, standard)
    ids = g.input("input_ids", TensorProto.INT64, ["rows", 1])
    past = g.input("past_lengths", TensorProto.INT32, ["rows"])
    source_last = g.input("source_last", TensorProto.INT32, ["rows"])
    total = g.begin_decoder()
    hidden = g.embed(ids, a.decoder_embedding, a.embedding_scale)
    if a.decoder_positions is not None:
        at = g.op("Unsqueeze", past, g.integers(1))
        hidden = g.op("Add", hidden, g.op("Gather", g.constant(a.decoder_positions), at))
    if a.decoder_embedding_norm is not None:
        hidden = g.norm(hidden, a.decoder_embedding_norm)
    bias = g.decoder_bias(a.decoder_bias, past, total) if a.decoder_bias is not None else ""

    hidden = decode(
        g,
        hidden,
        lambda i, packed: g.self_attention(packed, i, past, total, bias),
        lambda i, query: g.cross_attention(query, i, source_last),
    )
    hidden = g.op("Squeeze", hidden, g.integers(1))
    if a.output_scale != 1.0:
        hidden = g.op("Mul", hidden, g.scalar(a.output_scale))
    output_bias = a.output_bias if a.output_bias is not None and a.output_bias.any() else None
    g.project(hidden, a.projection, output_bias, "decoder.projection", output="logits")
    g.output("logits", ["rows", a.vocabulary], TensorProto.FLOAT)
    return g.finish()


def _writer(name: str, architecture: Architecture, ranges: Ranges | None, standard: Standard | None) -> Writer:
    if standard is None:
        return OnnxRuntimeWriter(name, architecture, ranges)
    return StandardWriter(name, architecture, ranges, _TYPES[standard])


def save_graphs(folder: Path, encoder: Graph, decoder: Graph, files: tuple[str, str, str]) -> None:
    """Write both graphs, and the embeddings, once, to the third of ``files``.

    Raises ExportError if a file would exceed protobuf's limit of 2 GB.
    """
    *names, shared_name = files
    offsets: dict[str, tuple[int, int]] = {}
    with (folder / shared_name).open("wb") as shared:
        for graph in (encoder, decoder):
            for tensor in graph.model.graph.initializer:
                if not tensor.name.startswith("shared/"):
                    continue
                if tensor.name not in offsets:
                    shared.write(b"\0" * (-shared.tell() % _SHARED_ALIGNMENT))
                    offsets[tensor.name] = (shared.tell(), len(tensor.raw_data))
                    shared.write(tensor.raw_data)
                _make_external(tensor, shared_name, *offsets[tensor.name])
    for name, graph in zip(names, (encoder, decoder)):
        if graph.model.ByteSize() >= 2**31:
            raise ExportError(
                f"{name} would have {graph.model.ByteSize():,} bytes, more than ONNX's limit of 2 GB", "use --int8"
            )
        onnx.save(graph.model, folder / name)


def read_graph(path: Path) -> Graph:
    """Read a graph that ``save_graphs`` wrote, without loading its shared weights. Raises ExportError for another
    graph.
    """
    model = onnx.load(path, load_external_data=False)
    for entry in model.metadata_props:
        if entry.key == ACTIVATIONS:
            return Graph(model, json.loads(entry.value))
    raise ExportError(
        f"{path}: its metadata does not name the linear layers: another version of deploykit wrote it",
        "export the model again",
    )


def _make_external(tensor: onnx.TensorProto, location: str, offset: int, length: int) -> None:
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", str(offset)), ("length", str(length))):
        tensor.external_data.add(key=key, value=value)


def side_by_side(*layers: Linear) -> Linear:
    """Merge layers with the same input into one layer."""
    weight = np.concatenate([layer.weight for layer in layers], axis=1)
    if all(layer.bias is None for layer in layers):
        return Linear(weight)
    biases = [np.zeros(la.weight.shape[1], np.float32) if la.bias is None else la.bias for la in layers]
    return Linear(weight, np.concatenate(biases))


def with_activations(graph: Graph) -> Graph:
    """Return the graph with every linear layer's input as an additional output, for calibration."""
    model = onnx.ModelProto()
    model.CopyFrom(graph.model)
    for tensor in dict.fromkeys(graph.activations.values()):
        model.graph.output.append(helper.make_tensor_value_info(tensor, TensorProto.FLOAT, None))
    return replace(graph, model=model)
