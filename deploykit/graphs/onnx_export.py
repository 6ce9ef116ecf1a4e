"""PyTorch to ONNX."""

from __future__ import annotations

import contextlib
import copy
import io
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnxruntime as ort
import torch

from deploykit.errors import ExportError

OPSET = 17
"""The newest operator set that every target here reads: TensorRT 8.5 and ONNX Runtime 1.12 and later."""


HALF_OPSET = 19
"""The first whose QuantizeLinear takes fp16: TensorRT 8.6 and later."""


@dataclass(frozen=True)
class Signature:
    """The inputs of an encoder's graph, int64 [batch, tokens], and its outputs, float32, with their dynamic axes."""

    inputs: tuple[str, ...]
    outputs: Mapping[str, tuple[str, ...]]


CLASSIFIER = Signature(("input_ids", "attention_mask"), {"logits": ("batch",)})


def export_classifier(model: Any, path: Path) -> None:
    """Write the fp32 graph of a sequence classification model: ``export_encoder`` with the output logits [batch, labels]."""
    export_encoder(model, path, CLASSIFIER)


def export_half_classifier(model: Any, path: Path, kind: torch.dtype) -> None:
    """``export_half_encoder`` of a sequence classification model."""
    export_half_encoder(model, path, kind, CLASSIFIER)


def export_encoder(model: Any, path: Path, signature: Signature) -> None:
    """Write the fp32 graph of a model whose outputs have the names of ``signature``.

    Attention must be eager: only then are all operators standard ones. Raises ExportError naming what PyTorch's exporter
    could not translate.
    """
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        traced = Path(folder) / "traced.onnx"
        _trace(model, traced, OPSET, signature)
        _fold_constants(traced, path)


def export_half_encoder(model: Any, path: Path, kind: torch.dtype, signature: Signature) -> None:
    """``export_encoder`` computing in ``kind``, float16 or bfloat16, throughout; outputs are float32 all the same.

    For TensorRT, which takes types as the graph has them. ONNX Runtime would put casts into it, so it folds nothing here.
    """
    _trace(copy.deepcopy(model).to(kind), path, HALF_OPSET, signature)
    onnx.checker.check_model(onnx.load(path))


def _trace(model: Any, path: Path, opset: int, signature: Signature) -> None:
    example = torch.ones(2, 16, dtype=torch.long)
    try:
        with warnings.catch_warnings(), torch.no_grad(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")  # the tracer warns of each Python branch; parity is measured below
            torch.onnx.export(
                _OutputsOnly(model, signature).eval(),
                (example,) * len(signature.inputs),
                str(path),
                dynamo=False,  # the graph that ONNX Runtime's attention fusion recognises
                opset_version=opset,
                input_names=list(signature.inputs),
                output_names=list(signature.outputs),
                dynamic_axes={
                    **{name: {0: "batch", 1: "tokens"} for name in signature.inputs},
                    **{name: dict(enumerate(axes)) for name, axes in signature.outputs.items()},
                },
            )
    except Exception as error:  # the exporter raises many types, all meaning the same here
        raise ExportError(
            f"PyTorch cannot export {type(model).__name__} to ONNX: {str(error).strip().splitlines()[0]}",
            "this architecture is not supported yet; see 'What has been run where' in docs",
        ) from error


class _OutputsOnly(torch.nn.Module):  # type: ignore[misc]
    def __init__(self, model: Any, signature: Signature) -> None:
        super().__init__()
        self.model = model
        self._signature = signature

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        outputs = self.model(**dict(zip(self._signature.inputs, tensors)))
        return tuple(outputs[name].float() for name in self._signature.outputs)


def _fold_constants(source: Path, target: Path) -> None:
    """Fold constants and drop what they leave, keeping to standard operators: transposed weights
    become plain ones, which quantization needs to find."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(target)
    options.log_severity_level = 3
    ort.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])
    model = onnx.load(target)
    standard = [entry for entry in model.opset_import if entry.domain == ""]
    del model.opset_import[:]  # ONNX Runtime lists its own domains, which other engines refuse
    model.opset_import.extend(standard)
    foreign = {node.op_type for node in model.graph.node if node.domain not in ("", "ai.onnx")}
    if foreign:
        raise ExportError(f"the graph holds operators that are not standard ONNX: {', '.join(sorted(foreign))}")
    onnx.checker.check_model(model)
    onnx.save(model, target)
