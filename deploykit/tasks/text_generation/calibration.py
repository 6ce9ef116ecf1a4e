"""Calibrate a language model: observe the inputs of its linear layers while it reads real rows in fp32."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from deploykit.artifacts import digest_of
from deploykit.graphs.architecture import Attention, FeedForward, Linear, Norm
from deploykit.graphs.causal_architecture import CausalArchitecture, CausalLayer
from deploykit.graphs.seq2seq import read_graph, with_activations
from deploykit.hardware import available_cpus
from deploykit.quantization.calibration import Calibration, Observe, collect, equal_length_batches
from deploykit.quantization.compensated import factor
from deploykit.quantization.qdq import Ranges
from deploykit.quantization.smooth_quant import channel_scales
from deploykit.runtime.engines.onnxruntime import session_options

_WIDEST = 4096


@dataclass(frozen=True)
class StaticInt8:
    """The source of graphs with calibrated activations. ``ranges`` are by the name of the linear layer;
    ``architecture`` is smoothed if SmoothQuant was asked for."""

    architecture: CausalArchitecture
    ranges: Ranges


def activations_of(graph: Path) -> dict[str, str]:
    """Return the linear layers of an fp32 ``graph`` in optimum's layout: name -> the first layer that reads the same
    tensor."""
    activations = read_graph(graph).activations
    first = _first_readers(activations)
    return {name: first[tensor] for name, tensor in activations.items()}


def _first_readers(activations: Mapping[str, str]) -> dict[str, str]:
    """Return tensor -> the first linear layer that reads it."""
    first: dict[str, str] = {}
    for name, tensor in activations.items():
        first.setdefault(tensor, name)
    return first


def calibrate_graph(graph: Path, token_ids: Sequence[Sequence[int]]) -> Calibration:
    """Run rows of token ids, unpadded, through the fp32 ``graph``, and collect the inputs of its linear layers. Each
    tensor has the name of the first layer that reads it."""
    return collect(lambda observe: _show(graph, token_ids, observe), len(token_ids), digest_of(list(token_ids)))


def input_factors(graph: Path, token_ids: Sequence[Sequence[int]]) -> dict[str, NDArray[np.float32]]:
    """Run rows of token ids through the fp32 ``graph``. Returns the statistics for compensated rounding of the inputs of its linear
    layers, by the layer's name; none of layers with more than ``_WIDEST`` inputs, where it would take too long."""
    squares: dict[str, NDArray[np.float32]] = {}

    def add(name: str, values: NDArray[np.float32]) -> None:
        rows = values.reshape(-1, values.shape[-1])
        if rows.shape[1] <= _WIDEST:
            squares[name] = squares.get(name, np.float32(0)) + rows.T @ rows

    _show(graph, token_ids, add)
    found = {name: factor(squares.pop(name)) for name in [*squares]}
    return {layer: found[first] for layer, first in activations_of(graph).items() if first in found}


def static_int8(architecture: CausalArchitecture, graph: Path, ranges: Ranges) -> StaticInt8:
    """Return the source of INT8 graphs, for ``ranges`` of ``calibrate_graph``."""
    return StaticInt8(architecture, {n: ranges[first] for n, first in activations_of(graph).items() if first in ranges})


def smoothed(
    architecture: CausalArchitecture, graph: Path, token_ids: Sequence[Sequence[int]], alpha: float
) -> CausalArchitecture:
    """Return the same function after SmoothQuant: each channel that a norm passes to linear layers is divided by a scale
    in the norm, and multiplied by it in their weights. ``graph`` is the fp32 graph of ``architecture``."""
    maxima: dict[str, NDArray[np.float32]] = {}

    def widen(name: str, values: NDArray[np.float32]) -> None:
        highest = np.abs(values).reshape(-1, values.shape[-1]).max(axis=0)
        maxima[name] = np.maximum(maxima.get(name, highest), highest)

    _show(graph, token_ids, widen)
    layers = [
        _smoothed_layer(layer, maxima[f"layers.{i}.attention.query"], maxima[f"layers.{i}.feed_forward.up"], alpha)
        for i, layer in enumerate(architecture.layers)
    ]
    return replace(architecture, layers=layers)


def _smoothed_layer(
    layer: CausalLayer, attention: NDArray[np.float32], feed_forward: NDArray[np.float32], alpha: float
) -> CausalLayer:
    attended, attention_norm = _divided(
        layer.attention, ("query", "key", "value"), layer.attention_norm, attention, alpha
    )
    names = ("up", "gate") if layer.feed_forward.gate is not None else ("up",)
    fed, feed_forward_norm = _divided(layer.feed_forward, names, layer.feed_forward_norm, feed_forward, alpha)
    return replace(
        layer, attention=attended, attention_norm=attention_norm, feed_forward=fed, feed_forward_norm=feed_forward_norm
    )


_Block = TypeVar("_Block", Attention, FeedForward)


def _divided(
    block: _Block, names: Sequence[str], norm: Norm, activation: NDArray[np.float32], alpha: float
) -> tuple[_Block, Norm]:
    """Divide the output of ``norm`` by scales, and multiply the weights of the linear layers ``names`` by them."""
    layers: dict[str, Linear] = {name: getattr(block, name) for name in names}
    highest = np.max([np.abs(layer.weight).max(axis=1) for layer in layers.values()], axis=0)
    scales = channel_scales(activation, highest, alpha)
    changed: dict[str, Any] = {
        name: replace(layer, weight=layer.weight * scales[:, None]) for name, layer in layers.items()
    }
    beta = None if norm.beta is None else norm.beta / scales
    return replace(block, **changed), replace(norm, gamma=norm.gamma / scales, beta=beta)


def _show(graph: Path, token_ids: Sequence[Sequence[int]], observe: Observe) -> None:
    described = read_graph(graph)
    tensors = _first_readers(described.activations)
    options = session_options(available_cpus())
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(graph.parent))
    session = ort.InferenceSession(
        with_activations(described).model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    pasts = {i.name: i.shape for i in session.get_inputs() if i.name.startswith("past_key_values.")}
    for batch in equal_length_batches(token_ids):
        rows, length = batch.shape
        inputs = {
            "input_ids": batch,
            "attention_mask": np.ones_like(batch),
            "position_ids": np.broadcast_to(np.arange(length), batch.shape),
            **{name: np.zeros((rows, heads, 0, size), np.float32) for name, (_, heads, _, size) in pasts.items()},
        }
        for tensor, values in zip(tensors, session.run(list(tensors), inputs)):
            observe(tensors[tensor], values)
