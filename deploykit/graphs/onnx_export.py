"""Export PyTorch models to ONNX."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch

from deploykit.artifacts import write_refusal
from deploykit.errors import ExportError
from deploykit.quantization import onnx_files
from deploykit.quantization.onnx_files import data_file, save_graph

OPSET = 17
"""The newest operator set that every target reads: TensorRT 8.5 and ONNX Runtime 1.12 and later."""


HALF_OPSET = 19
"""The first operator set whose QuantizeLinear accepts fp16: TensorRT 8.6 and later."""


@dataclass(frozen=True)
class Signature:
    """The inputs of an encoder's graph, int64 [batch, tokens], and its outputs, float32, with their dynamic axes."""

    inputs: tuple[str, ...]
    outputs: Mapping[str, tuple[str, ...]]


_INPUTS = ("input_ids", "attention_mask")


def export_classifier(model: Any, path: Path, inputs: Sequence[str] = _INPUTS) -> None:
    """Write the fp32 graph of a model that classifies texts or their tokens.

    ``inputs``: int64 [batch, tokens] each. Output: logits, float32 [batch, labels] or [batch, tokens, labels]. Otherwise
    as ``export_encoder``.
    """
    export_encoder(model, path, _classifier_signature(model, inputs))


def export_half_classifier(model: Any, path: Path, kind: torch.dtype, inputs: Sequence[str] = _INPUTS) -> None:
    """Write the graph of ``export_classifier`` in ``kind``, float16 or bfloat16; logits are still float32."""
    export_half_encoder(model, path, kind, _classifier_signature(model, inputs))


def export_encoder(model: Any, path: Path, signature: Signature) -> None:
    """Write the fp32 graph of a model whose outputs have the names of ``signature``.

    Batch and tokens are dynamic. Attention must be eager, or the graph would have non-standard operators. Raises
    ExportError with the reason if PyTorch's exporter fails.
    """
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        traced = Path(folder) / "traced.onnx"
        _trace(model, traced, OPSET, signature)
        _name_squeezed_axes(traced)
        _fold_constants(traced, path)


def export_half_encoder(model: Any, path: Path, kind: torch.dtype, signature: Signature) -> None:
    """Write the graph of ``export_encoder`` in ``kind``, float16 or bfloat16; outputs are still float32.

    It is for TensorRT, which uses the types in the graph. ONNX Runtime would insert casts, so it does not fold
    constants here.
    """
    _trace(copy.deepcopy(model).to(kind), path, HALF_OPSET, signature)
    onnx.checker.check_model(str(path))


def save_hub_files(model: Any, tokenizer: Any, directory: Path) -> None:
    """Write config.json and the tokenizer's files next to the graphs, in the layout of ``optimum-cli export onnx``.

    With them, optimum's ``ORTModelFor...`` classes and transformers.js open the export.
    """
    model.config.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    path = directory / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    if settings.get("tokenizer_class") == "TokenizersBackend":  # use the name that transformers 4 and 5 both know
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _classifier_signature(model: Any, inputs: Sequence[str]) -> Signature:
    with _explained(model), torch.no_grad():
        logits = model.eval()(**dict(zip(inputs, _examples(model, len(inputs))))).logits
    return Signature(tuple(inputs), {"logits": ("batch", "tokens") if logits.ndim == 3 else ("batch",)})


def _examples(model: Any, count: int) -> tuple[torch.Tensor, ...]:
    """Return token ids and ``count`` - 1 other inputs."""
    input_ids = torch.ones(2, 16, dtype=torch.long)
    others = (torch.ones_like(input_ids),) * (count - 1)
    if model.config.is_encoder_decoder:
        input_ids[:, -1] = model.config.eos_token_id  # BART's head reads the last end token
    return input_ids, *others


def _trace(model: Any, path: Path, opset: int, signature: Signature) -> None:
    with _explained(model), torch.no_grad(), _silenced():
        torch.onnx.export(
            _OutputsOnly(model, signature).eval(),
            _examples(model, len(signature.inputs)),
            str(path),
            dynamo=False,  # ONNX Runtime's attention fusion recognizes this graph
            opset_version=opset,
            input_names=list(signature.inputs),
            output_names=list(signature.outputs),
            dynamic_axes={
                **{name: {0: "batch", 1: "tokens"} for name in signature.inputs},
                **{name: dict(enumerate(axes)) for name, axes in signature.outputs.items()},
            },
        )


@contextlib.contextmanager
def _silenced() -> Iterator[None]:
    """Suppress the exporter's output: on an error it prints the whole graph, from C++."""
    sys.stdout.flush()
    kept = os.dup(1)
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            os.dup2(nowhere.fileno(), 1)
            yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


@contextlib.contextmanager
def _explained(model: Any) -> Iterator[None]:
    """Turn PyTorch's errors in running or tracing a model into ExportError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the tracer warns of each Python branch; the parity check covers that
            yield
    except Exception as error:  # the exporter raises many types
        if write_refusal(error):
            raise
        raise ExportError(
            f"PyTorch cannot export {type(model).__name__} to ONNX: {str(error).strip().splitlines()[0]}",
            "this architecture is not supported; see the page 'What has been run where' in the docs",
        ) from error


class _OutputsOnly(torch.nn.Module):  # type: ignore[misc]
    def __init__(self, model: Any, signature: Signature) -> None:
        super().__init__()
        self.model = model
        self._signature = signature

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        outputs = self.model(**dict(zip(self._signature.inputs, tensors)))
        return tuple(getattr(outputs, name).float() for name in self._signature.outputs)


def _name_squeezed_axes(path: Path) -> None:
    """Give each Squeeze that removes all axes of length 1 the axes it removes: OpenVINO runs none of dynamic rank."""
    model = onnx.load(path, load_external_data=False)
    nodes = [node for node in model.graph.node if node.op_type == "Squeeze" and len(node.input) == 1]
    if not nodes:
        return
    inferred = onnx.shape_inference.infer_shapes(model).graph.value_info
    shapes = {value.name: value.type.tensor_type.shape.dim for value in inferred}
    for number, node in enumerate(nodes):
        axes = [axis for axis, size in enumerate(shapes.get(node.input[0], ())) if size.dim_value == 1]
        if axes:
            name = f"squeezed_axes_{number}"
            model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(axes, np.int64), name))
            node.input.append(name)
    onnx.save(model, path)


def _fold_constants(source: Path, target: Path) -> None:
    """Fold constants and remove unused ones, with standard operators only.

    Transposed weights become plain ones, which quantization needs.
    """
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(target)
    options.log_severity_level = 3
    weights = data_file(target)
    if sum(file.stat().st_size for file in source.parent.iterdir()) > onnx_files.LARGEST:
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", weights.name)
    try:
        ort.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions have no common base
        reason = str(error).strip().splitlines()[0].replace(f"{source.parent}/", "")
        raise ExportError(
            f"ONNX Runtime cannot load the graph that PyTorch exported: {reason}",
            "this architecture is not supported; see the page 'What has been run where' in the docs",
        ) from error
    model = onnx.load(target)
    standard = [entry for entry in model.opset_import if entry.domain == ""]
    del model.opset_import[:]  # ONNX Runtime adds its own domains, which other engines refuse
    model.opset_import.extend(standard)
    foreign = {node.op_type for node in model.graph.node if node.domain not in ("", "ai.onnx")}
    if foreign:
        raise ExportError(f"the graph holds operators that are not standard ONNX: {', '.join(sorted(foreign))}")
    save_graph(model, target)
