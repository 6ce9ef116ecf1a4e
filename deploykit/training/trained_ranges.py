"""Return the ranges of a checkpoint that was trained for INT8, by the names of a graph's tensors."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Collection
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from deploykit.errors import ExportError
from deploykit.quantization.qdq import linear_layers
from deploykit.training.qat import FILE, TrainedScales

_REMEDY = "train it again with `deploykit finetune --qat`, or delete the file to calibrate instead; nothing was written"


def trained_ranges(
    trained: TrainedScales, model: Any, graph: onnx.ModelProto, activations: Collection[str]
) -> dict[str, tuple[float, float]]:
    """Return the range of each of ``activations`` that linear layers of ``graph`` read, symmetric: -127 to 127 steps.

    Layers are identified by their weights, which must equal those of a module of ``model`` (the checkpoint in PyTorch).
    Raises ExportError when a layer that is to be quantized has no scale, when two that read one activation differ, or when a
    trained scale belongs to none.
    """
    modules: dict[str, list[str]] = defaultdict(list)
    for name in trained.scales:
        try:
            weight = model.get_submodule(name).weight
        except AttributeError as error:
            raise ExportError(f"{FILE}: {type(model).__name__} has no linear layer {name}", _REMEDY) from error
        modules[_digest(weight.detach().numpy().T)].append(name)
    weights = {i.name: i for i in graph.graph.initializer}
    found: dict[str, set[float]] = defaultdict(set)
    used: set[str] = set()
    for layer in linear_layers(graph):
        if layer.activation not in activations:
            continue
        weight = numpy_helper.to_array(weights[layer.weight])
        names = modules.get(_digest(weight.T if layer.transposed else weight), [])
        if not names:
            raise ExportError(f"{FILE}: has no scale for the input of {layer.node}, which is to be INT8", _REMEDY)
        used.update(names)
        found[layer.activation].update(trained.scales[name] for name in names)
    for activation, scales in found.items():
        if len(scales) > 1:
            raise ExportError(f"{FILE}: layers that read {activation} have different scales: {sorted(scales)}", _REMEDY)
    if unused := sorted(set(trained.scales) - used):
        raise ExportError(f"{FILE}: {unused[0]} has a scale, and no layer of the graph has its weights", _REMEDY)
    return {name: (-127 * scale, 127 * scale) for name, (scale,) in found.items()}


def _digest(weight: NDArray[np.float32]) -> str:
    """Return the digest of a weight, float32 [in, out]."""
    return hashlib.sha256(np.ascontiguousarray(weight).tobytes() + str(weight.shape).encode()).hexdigest()
