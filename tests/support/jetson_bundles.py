"""Exports with the graphs of ``export --trt``, for bundles."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from deploykit.artifacts import SAMPLES, load_manifest, write_manifest

TEXTS = [f"w{i} w{i * 7 % 200} w3" for i in range(80)]


def silent(line: str) -> None:
    pass


def with_tensorrt_graphs(export: Path, *graphs: str) -> Path:
    """Add the files of ``export --trt`` to a tiny export; the graphs are copies of model.onnx."""
    task = load_manifest(export).task
    for graph in graphs or ("model.fp16.onnx", "model.qdq.onnx"):
        shutil.copyfile(export / "model.onnx", export / graph)
    (export / SAMPLES).write_text("".join(json.dumps({"text": text, "label": "x"}) + "\n" for text in TEXTS))
    write_manifest(export, "export", task, inputs="tiny with TensorRT's graphs")
    return export
