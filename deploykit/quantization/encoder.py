"""Quantize the graph of an encoder: calibrate it, optionally smooth it, and write its parts in INT8."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import onnx

from deploykit.errors import ExportError
from deploykit.quantization.activations import show_activations
from deploykit.quantization.calibration import Calibration, collect
from deploykit.quantization.onnx_files import remove_graph, save_graph
from deploykit.quantization.qdq import QuantizedCount, Ranges, Scheme, linear_layers, quantize
from deploykit.quantization.smooth_quant import Scales, SmoothedCount, smooth, smoothing_scales
from deploykit.runtime.engines import ENGINES

GRAPH = ENGINES["onnxruntime"].graphs["fp32"]
"""The file of the fp32 graph in an encoder's export."""
SCHEMES: tuple[Scheme, ...] = ("s8s8", "u8s8")
"""Schemes of the INT8 graphs in an encoder's export, model.SCHEME.onnx."""


class Quantizer(Protocol):
    """Writes a model with some of its ``parts`` in INT8."""

    parts: list[str]

    def write(self, parts: Collection[str]) -> Any:
        """Write the model with these parts in INT8, the others unchanged."""


class GraphQuantizer:
    """Writes the Q/DQ graph of one scheme. A part is an activation: the layers that read it are INT8 together."""

    def __init__(
        self,
        model: onnx.ModelProto,
        path: Path,
        scheme: Scheme,
        ranges: Ranges,
        *,
        embeddings: bool = True,
    ) -> None:
        self._model = model
        self._path, self._scheme, self._ranges, self._embeddings = path, scheme, ranges, embeddings
        self.parts = list(ranges)

    def write(self, parts: Collection[str]) -> QuantizedCount:
        ranges = {name: self._ranges[name] for name in self._ranges if name in parts}
        quantized, count = quantize(self._model, ranges, self._scheme, embeddings=self._embeddings)
        save_graph(quantized, self._path)
        return count


@dataclass(frozen=True)
class Calibrated:
    """The calibration of the fp32 ``model``, whose activations were divided by ``smoothing``."""

    model: onnx.ModelProto
    calibration: Calibration
    smoothing: Scales = field(default_factory=dict)
    smoothed: SmoothedCount | None = None


@dataclass(frozen=True)
class TokenRows:
    """Token ids of rows, unpadded; ``types`` are for graphs with token type ids. ``digest`` identifies the rows."""

    ids: Sequence[Sequence[int]]
    digest: str
    types: Sequence[Sequence[int]] | None = None


def activations_of(graph: Path) -> set[str]:
    """Return the input tensors of linear layers in an fp32 ``graph``."""
    return {layer.activation for layer in linear_layers(onnx.load(graph))}


def calibrate_encoder(graph: Path, rows: TokenRows) -> Calibration:
    """Run rows through the fp32 ``graph`` and collect its quantizable activations.

    Only activations with a row for each token are collected. Layers after pooling stay fp32: they have one row per
    text, cost almost nothing, and decide the answer.
    """
    return collect(lambda observe: show_activations(graph, rows.ids, observe, rows.types), len(rows.ids), rows.digest)


def calibrate_smoothed(graph: Path, rows: TokenRows, alpha: float | None, say: Callable[[str], None]) -> Calibrated:
    """Calibrate ``graph``, after SmoothQuant if ``alpha`` is given.

    Raises ExportError if SmoothQuant finds nothing to smooth.
    """
    if alpha is None:
        return Calibrated(onnx.load(graph), calibrate_encoder(graph, rows))
    scales = smoothing_scales(graph, rows.ids, alpha, rows.types)
    if not scales:
        raise ExportError("--smooth-quant: no layer norm of this model feeds a linear layer", "leave it out")
    model, count = smooth(onnx.load(graph), scales)
    say(f"SmoothQuant: {count.folded} activations by the norm before them, {count.multiplied} by a separate Mul")
    smoothed = graph.with_name("smoothed.onnx")
    save_graph(model, smoothed)
    calibration, model = calibrate_encoder(smoothed, rows), onnx.load(smoothed)
    remove_graph(smoothed)
    return Calibrated(model, calibration, scales, count)
