"""Open inference engines, which have one protocol.

To add an engine, write a module in this folder with a class that satisfies ``Engine``, and add it to ``ENGINES``.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploykit.errors import EngineError, MissingDependencyError, UsageError
from deploykit.hardware import available_cpus
from deploykit.runtime.cuda import has_gpu
from deploykit.runtime.engines.native.loader import lacks as native_lacks

if TYPE_CHECKING:
    from deploykit.runtime.engines.causal_lm import CausalLm
    from deploykit.runtime.engines.protocol import DecodeModel, Engine, Precision


@dataclass(frozen=True)
class EngineInfo:
    """The location of an engine's classes, its requirements, and the graphs of an export that it runs.

    - ``location``: its ``Engine``, which runs ``graphs`` (classifiers); empty if it has none.
    - ``decoder``: its ``DecodeModel``, which runs ``translators``; empty if it has none.
    - ``language_model``: its ``CausalLm``, which runs ``language_models``; empty if it has none.
    - ``packages``: any one of these is enough; ``extra`` installs one.
    - ``built``: the export's manifest lists the engines built for it.
    - ``provider``: the execution provider that ONNX Runtime must have.
    """

    location: str = ""
    packages: tuple[str, ...] = ()
    extra: str = ""
    graphs: Mapping[Precision, str] = field(default_factory=dict)
    decoder: str = ""
    translators: Mapping[Precision, tuple[str, ...]] = field(default_factory=dict)
    language_model: str = ""
    language_models: Mapping[Precision, tuple[str, ...]] = field(default_factory=dict)
    built: bool = False
    gpu: bool = False
    provider: str = ""

    @property
    def lacks(self) -> str | None:
        """Return a missing requirement on this machine, or None."""
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
        """Whether the engine can run here."""
        return self.lacks is None


TRANSLATION_FILES: Mapping[Precision, tuple[str, str, str]] = {
    "fp32": ("encoder.onnx", "decoder.onnx", "shared.bin"),
    "int8": ("encoder.u8s8.onnx", "decoder.u8s8.onnx", "shared.u8s8.bin"),
}
"""Files of a translator for ONNX Runtime: encoder graph, decoder graph, and the weights of both."""
TRANSLATION_ENGINE = "onnxruntime"
"""The engine that translates on every machine. Calibration and parity checks use it."""
LANGUAGE_MODEL_FILES: Mapping[Precision, tuple[str, str]] = {
    "fp32": ("decoder.onnx", "model.onnx_data"),
    "int8": ("decoder.int8.onnx", "model.int8.onnx_data"),
    "int4": ("decoder.int4.onnx", "model.int4.onnx_data"),
}
"""Files of a language model for ONNX Runtime: the graph that deploykit decodes with, and the weights."""
NATIVE_FILE = "native.int8.safetensors"
NATIVE_LANGUAGE_MODELS: Mapping[Precision, tuple[str]] = {"int8": (NATIVE_FILE,), "int4": ("native.int4.safetensors",)}

# In the order in which "auto" prefers them. OpenVINO runs encoders faster than ONNX Runtime on every x86 CPU measured,
# and native is faster than both.
ENGINES: Mapping[str, EngineInfo] = {
    "tensorrt": EngineInfo(
        "deploykit.runtime.engines.tensorrt_classifier:TensorRtEngine",
        ("tensorrt", "tensorrt_rtx"),
        "tensorrt",
        decoder="deploykit.runtime.engines.tensorrt_seq2seq:TensorRtSeq2Seq",
        built=True,
        gpu=True,
    ),
    "native": EngineInfo(
        "deploykit.runtime.engines.native.encoder:NativeEngine",
        graphs={"int8": NATIVE_FILE},
        decoder="deploykit.runtime.engines.native.translator:NativeModel",
        translators={"int8": (NATIVE_FILE,)},
        language_model="deploykit.runtime.engines.native.causal_lm:NativeCausalLm",
        language_models=NATIVE_LANGUAGE_MODELS,
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
        "deploykit.runtime.engines.causal_lm:OnnxCausalLm",
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
    """Raise UsageError for an unknown engine, MissingDependencyError if it cannot run on this machine."""
    check_name(name)
    lacks = ENGINES[name].lacks
    if lacks == "no GPU":
        raise MissingDependencyError(
            f"the engine {name} needs an NVIDIA GPU and its driver, and this machine has none",
            "use a machine where nvidia-smi shows a GPU (a container needs --gpus), or a CPU engine: --engine onnxruntime",
        )
    if lacks and not ENGINES[name].packages:
        raise MissingDependencyError(
            f"the engine {name} does not run here: {lacks}", "choose another engine: --engine onnxruntime"
        )
    if lacks:
        raise MissingDependencyError(
            f"the engine {name} is not installed", f"pip install 'deploykit[{ENGINES[name].extra}]'"
        )


def check_name(name: str) -> None:
    """Raise UsageError for an unknown engine."""
    if name not in ENGINES:
        raise UsageError(f"unknown engine {name!r}", f"choose one of: auto, {', '.join(ENGINES)}")


def installed_engines() -> list[str]:
    """Return the engines that can run classifiers here, best first. Raises MissingDependencyError if there are none."""
    names = [name for name, info in ENGINES.items() if info.location and info.installed]
    if not names:
        raise MissingDependencyError("no inference engine is installed", "pip install 'deploykit[cpu,openvino]'")
    return names


def load_engine(name: str, graph: Path, threads: int | None = None, device: int = 0) -> Engine:
    """Load ``graph`` with the engine ``name``, on ``threads`` CPU threads (default: all CPUs) or GPU ``device``."""
    engine: type[Engine] = _class(name, ENGINES[name].location, graph)
    return engine(graph, threads or available_cpus(), device)


def load_decode_model(
    name: str, folder: Path, files: Sequence[str], threads: int | None = None, device: int = 0
) -> DecodeModel:
    """Load encoder and decoder, the first two of ``files`` in ``folder``, as ``load_engine`` does."""
    model: type[DecodeModel] = _class(name, ENGINES[name].decoder, *(folder / file for file in files[:2]))
    return model(folder, files, threads or available_cpus(), device)


def load_language_model(name: str, file: Path, threads: int, *, context: int, **limits: int) -> CausalLm:
    """Open a language model's ``file`` with the engine ``name``; ``limits`` are those of ``CausalLm``."""
    model: type[CausalLm] = _class(name, ENGINES[name].language_model, file)
    return model(file, threads, context=context, **limits)


def _class(name: str, location: str, *graphs: Path) -> Any:
    for graph in graphs:
        if not graph.is_file():
            raise EngineError(f"{graph}: no such graph", "export the model again, in this precision")
    check_engine(name)
    module, class_name = location.split(":")
    return getattr(importlib.import_module(module), class_name)
