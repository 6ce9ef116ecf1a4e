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
from deploykit.runtime.cuda import has_gpu

Precision = Literal["fp32", "fp16", "bf16", "int8"]


class Engine(Protocol):
    """A graph loaded and ready to run. Not thread-safe: one caller at a time.

    ``token_budget`` is the rows x padded length of one run that it does best with.
    """

    token_budget: int

    def __init__(self, graph: Path, threads: int, device: int = 0) -> None:
        """Load ``graph``, for so many CPU threads or for the GPU of that number, whichever the engine runs on.

        Raises EngineError naming the file if the engine refuses it.
        """

    def run(self, inputs: Mapping[str, NDArray[np.int64]]) -> list[NDArray[Any]]:
        """The graph's outputs, in its order, as arrays of the caller's own."""

    def int8_kernels(self) -> int:
        """How many INT8 matrix kernels the engine compiled from the graph: the proof that
        quantization took effect."""


@dataclass(frozen=True)
class EngineInfo:
    """Where an engine's class is, what it needs, and which graph of an export it runs.

    Any one of ``packages`` will do. ``graphs`` are empty where an export lists what was built for the engine.
    """

    location: str
    packages: tuple[str, ...]
    extra: str
    graphs: Mapping[Precision, str]
    gpu: bool = False

    @property
    def lacks(self) -> str | None:
        """What it needs and this machine does not have, if anything."""
        if not any(importlib.util.find_spec(package) for package in self.packages):
            return "not installed"
        return "no GPU" if self.gpu and not has_gpu() else None

    @property
    def installed(self) -> bool:
        """Whether it can run here."""
        return self.lacks is None


# In the order in which "auto" prefers them: OpenVINO encodes faster than ONNX Runtime on every x86
# CPU measured here.
ENGINES: Mapping[str, EngineInfo] = {
    "tensorrt": EngineInfo(
        "deploykit.runtime.engines.tensorrt:TensorRtEngine", ("tensorrt", "tensorrt_rtx"), "rtx", {}, gpu=True
    ),
    "openvino": EngineInfo(
        "deploykit.runtime.engines.openvino:OpenVinoEngine",
        ("openvino",),
        "openvino",
        {"fp32": "model.onnx", "int8": "model.s8s8.onnx"},
    ),
    "onnxruntime": EngineInfo(
        "deploykit.runtime.engines.onnxruntime:OnnxRuntimeEngine",
        ("onnxruntime",),
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


def check_engine(name: str) -> None:
    """Raise UsageError for an unknown name, MissingDependencyError when this machine lacks what the engine needs."""
    check_name(name)
    lacks = ENGINES[name].lacks
    if lacks == "no GPU":
        raise MissingDependencyError(
            f"the engine {name} needs an NVIDIA GPU and its driver, and there is none here",
            "run it where nvidia-smi shows a GPU (a container needs --gpus), or choose a CPU engine: --engine onnxruntime",
        )
    if lacks:
        raise MissingDependencyError(
            f"the engine {name} is not installed", f"pip install 'deploykit[{ENGINES[name].extra}]'"
        )


def check_name(name: str) -> None:
    """Raise UsageError for the name of no engine."""
    if name not in ENGINES:
        raise UsageError(f"unknown engine {name!r}", f"choose one of: auto, {', '.join(ENGINES)}")


def installed_engines() -> list[str]:
    """Those that can run here, best first. Raises MissingDependencyError when there is none."""
    names = [name for name, info in ENGINES.items() if info.installed]
    if not names:
        raise MissingDependencyError("no inference engine is installed", "pip install 'deploykit[cpu,openvino]'")
    return names


def load_engine(name: str, graph: Path, threads: int | None = None, device: int = 0) -> Engine:
    """Load ``graph`` with the engine of that name, on ``threads`` CPU threads (default: all of them) or GPU ``device``."""
    if not graph.is_file():
        raise EngineError(f"{graph}: no such graph", "export the model again, with this engine's precision")
    check_engine(name)
    module, class_name = ENGINES[name].location.split(":")
    engine: type[Engine] = getattr(importlib.import_module(module), class_name)
    return engine(graph, threads or available_cpus(), device)


def available_cpus() -> int:
    """CPUs that this process may use (its affinity, as set by taskset or a container)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
