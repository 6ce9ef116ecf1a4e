"""Inference engines behind one Protocol.

Adding an engine: a module beside this one with a class that satisfies ``Engine``, and a line in
``ENGINES``.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deploykit.errors import EngineError, MissingDependencyError, UsageError
from deploykit.hardware import available_cpus
from deploykit.runtime.cuda import has_gpu
from deploykit.runtime.engines.native_library import lacks as native_lacks
from deploykit.runtime.engines.protocol import DecodeModel, Engine, Precision


@dataclass(frozen=True)
class EngineInfo:
    """Where an engine's classes are, what it needs, and which graph of an export it runs.

    ``location`` is that of its ``Engine``, which runs ``graphs``; ``decoder`` that of its ``DecodeModel``, which runs
    ``translators``; where it has one. ``language_models`` are the graphs of language models that it runs. Any one of
    ``packages`` will do. What was ``built`` for the engine an export lists.
    ``provider`` is the execution provider that ONNX Runtime must have for it.
    """

    location: str = ""
    packages: tuple[str, ...] = ()
    extra: str = ""
    graphs: Mapping[Precision, str] = field(default_factory=dict)
    decoder: str = ""
    translators: Mapping[Precision, tuple[str, ...]] = field(default_factory=dict)
    language_models: Mapping[Precision, tuple[str, ...]] = field(default_factory=dict)
    built: bool = False
    gpu: bool = False
    provider: str = ""

    @property
    def lacks(self) -> str | None:
        """What it needs and this machine does not have, if anything."""
        if self.packages and not any(importlib.util.find_spec(package) for package in self.packages):
            return "not installed"
        if self.gpu:
            if not has_gpu():
                return "no GPU"
            return f"this ONNX Runtime has no {self.provider}" if self.provider and not self._provided() else None
        return None if self.packages else native_lacks()

    def _provided(self) -> bool:
        import onnxruntime

        return self.provider in onnxruntime.get_available_providers()

    @property
    def installed(self) -> bool:
        """Whether it can run here."""
        return self.lacks is None


TRANSLATION_FILES: Mapping[Precision, tuple[str, str, str]] = {
    "fp32": ("encoder.onnx", "decoder.onnx", "shared.bin"),
    "int8": ("encoder.u8s8.onnx", "decoder.u8s8.onnx", "shared.u8s8.bin"),
}
"""ONNX Runtime's: the encoder's graph, the decoder's, and the weights that both use."""
TRANSLATION_ENGINE = "onnxruntime"
"""The one that translates on every machine, and gives calibration and parity what they look at."""
LANGUAGE_MODEL_FILES: Mapping[Precision, tuple[str, str]] = {
    "fp32": ("model.onnx", "model.onnx_data"),
    "int8": ("model.int8.onnx", "model.int8.onnx_data"),
    "int4": ("model.int4.onnx", "model.int4.onnx_data"),
}
"""ONNX Runtime's: the graph of a language model, and its weights."""
NATIVE_FILE = "native.int8.safetensors"

# In the order in which "auto" prefers them: OpenVINO encodes faster than ONNX Runtime on every x86 CPU measured here, and
# our own engine is faster than both.
ENGINES: Mapping[str, EngineInfo] = {
    "tensorrt": EngineInfo(
        "deploykit.runtime.engines.tensorrt_classifier:TensorRtEngine",
        ("tensorrt", "tensorrt_rtx"),
        "rtx",
        decoder="deploykit.runtime.engines.tensorrt_seq2seq:TensorRtSeq2Seq",
        built=True,
        gpu=True,
    ),
    "native": EngineInfo(
        "deploykit.runtime.engines.native_classifier:NativeEngine",
        graphs={"int8": NATIVE_FILE},
        decoder="deploykit.runtime.engines.native:NativeModel",
        translators={"int8": (NATIVE_FILE,)},
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
        "deploykit.runtime.engines.seq2seq:Seq2SeqModel",
        TRANSLATION_FILES,
        LANGUAGE_MODEL_FILES,
    ),
    # Last, so that "auto" does not choose it: it has not been measured on a GPU yet.
    "cuda": EngineInfo(
        "deploykit.runtime.engines.onnxruntime_cuda:OnnxRuntimeCudaEngine",
        ("onnxruntime",),
        "gpu",
        {"fp32": "model.onnx"},
        gpu=True,
        provider="CUDAExecutionProvider",
    ),
}


def check_engine(name: str) -> None:
    """Raise UsageError for an unknown name, MissingDependencyError when this machine lacks what the engine needs."""
    check_name(name)
    lacks = ENGINES[name].lacks
    if lacks == "no GPU":
        raise MissingDependencyError(
            f"the engine {name} needs an NVIDIA GPU and its driver, and there is none here",
            "run it where nvidia-smi shows a GPU (a container needs --gpus), or choose a CPU engine: --engine onnxruntime",
        )
    if lacks and not ENGINES[name].packages:
        raise MissingDependencyError(
            f"the engine {name} does not run here: {lacks}", "choose another: --engine onnxruntime"
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
    """Those that can run classifiers here, best first. Raises MissingDependencyError when there is none."""
    names = [name for name, info in ENGINES.items() if info.location and info.installed]
    if not names:
        raise MissingDependencyError("no inference engine is installed", "pip install 'deploykit[cpu,openvino]'")
    return names


def load_engine(name: str, graph: Path, threads: int | None = None, device: int = 0) -> Engine:
    """Load ``graph`` with the engine of that name, on ``threads`` CPU threads (default: all of them) or GPU ``device``."""
    engine: type[Engine] = _class(name, ENGINES[name].location, graph)
    return engine(graph, threads or available_cpus(), device)


def load_decode_model(
    name: str, folder: Path, files: Sequence[str], threads: int | None = None, device: int = 0
) -> DecodeModel:
    """Load the graphs in ``folder`` that the first of ``files`` name, encoder and decoder, as ``load_engine`` does."""
    model: type[DecodeModel] = _class(name, ENGINES[name].decoder, *(folder / file for file in files[:2]))
    return model(folder, files, threads or available_cpus(), device)


def _class(name: str, location: str, *graphs: Path) -> Any:
    for graph in graphs:
        if not graph.is_file():
            raise EngineError(f"{graph}: no such graph", "export the model again, with this engine's precision")
    check_engine(name)
    module, class_name = location.split(":")
    return getattr(importlib.import_module(module), class_name)
