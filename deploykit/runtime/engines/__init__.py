"""Inference engines behind one Protocol.

Adding an engine: a module beside this one with a class that satisfies ``Engine``, and a line in
``ENGINES``.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from deploykit.errors import EngineError, MissingDependencyError, UsageError

Precision = Literal["fp32", "int8"]


class Engine(Protocol):
    """A graph loaded and ready to run. Not thread-safe: one caller at a time."""

    def __init__(self, graph: Path, threads: int) -> None:
        """Load ``graph``. Raises EngineError naming the file if the engine refuses it."""

    def run(self, inputs: Mapping[str, NDArray[np.int64]]) -> list[NDArray[Any]]:
        """The graph's outputs, in its order, as arrays of the caller's own."""

    def int8_kernels(self) -> int:
        """How many INT8 matrix kernels the engine compiled from the graph: the proof that
        quantization took effect."""


@dataclass(frozen=True)
class EngineInfo:
    """Where an engine's class is, what it needs, and which graph of an export it runs."""

    location: str
    package: str
    extra: str
    graphs: Mapping[Precision, str]

    @property
    def installed(self) -> bool:
        return importlib.util.find_spec(self.package) is not None


# In the order in which "auto" prefers them: OpenVINO encodes faster than ONNX Runtime on every x86
# CPU measured here.
ENGINES: Mapping[str, EngineInfo] = {
    "openvino": EngineInfo(
        "deploykit.runtime.engines.openvino:OpenVinoEngine",
        "openvino",
        "openvino",
        {"fp32": "model.onnx", "int8": "model.s8s8.onnx"},
    ),
    "onnxruntime": EngineInfo(
        "deploykit.runtime.engines.onnxruntime:OnnxRuntimeEngine",
        "onnxruntime",
        "cpu",
        {"fp32": "model.onnx", "int8": "model.u8s8.onnx"},
    ),
}


TRANSLATION_ENGINE = "onnxruntime"
"""The one that decodes: its attention kernels append to their caches in place."""
TRANSLATION_FILES: Mapping[Precision, tuple[str, str, str]] = {
    "fp32": ("encoder.onnx", "decoder.onnx", "shared.bin"),
    "int8": ("encoder.u8s8.onnx", "decoder.u8s8.onnx", "shared.u8s8.bin"),
}
"""The encoder's graph, the decoder's, and the weights that both use."""


def choose_engine(name: str = "auto") -> str:
    """Resolve ``auto`` to the best installed engine.

    Raises UsageError for an unknown name, MissingDependencyError when it is not installed.
    """
    if name == "auto":
        for candidate, info in ENGINES.items():
            if info.installed:
                return candidate
        raise MissingDependencyError("no inference engine is installed", "pip install 'deploykit[cpu,openvino]'")
    if name not in ENGINES:
        raise UsageError(f"unknown engine {name!r}", f"choose one of: auto, {', '.join(ENGINES)}")
    if not ENGINES[name].installed:
        raise MissingDependencyError(
            f"the engine {name} is not installed", f"pip install 'deploykit[{ENGINES[name].extra}]'"
        )
    return name


def load_engine(name: str, graph: Path, threads: int | None = None) -> Engine:
    """Load ``graph`` with the engine of that name, on ``threads`` CPU threads (default: all of them)."""
    if not graph.is_file():
        raise EngineError(f"{graph}: no such graph", "export the model again, with this engine's precision")
    module, class_name = ENGINES[choose_engine(name)].location.split(":")
    engine: type[Engine] = getattr(importlib.import_module(module), class_name)
    return engine(graph, threads or available_cpus())


def available_cpus() -> int:
    """CPUs that this process may use (its affinity, as set by taskset or a container)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
