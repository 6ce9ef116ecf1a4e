"""Inference engines behind one Protocol.

Adding an engine: a module beside this one with a class that satisfies ``Engine``, and a line in
``ENGINES``.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from deploykit.errors import EngineError, MissingDependencyError, UsageError
from deploykit.runtime.cuda import has_gpu
from deploykit.runtime.engines.native_library import lacks as native_lacks

if TYPE_CHECKING:
    from deploykit.runtime.choice import Choice, Texts
    from deploykit.runtime.search import Beam

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


class BestTokens(Protocol):
    """The most probable tokens. ``logits`` are float32 [rows, vocabulary]; no row depends on another."""

    def __call__(self, logits: NDArray[np.float32], k: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Log-probabilities, descending, and ids of the ``k`` best tokens of each row: [rows, k] each.

        Of equals the lower id comes first.
        """

    def of(self, logits: NDArray[np.float32], tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        """Log-probability of one token of each row: float32 [rows]."""

    def log_sums(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """float32 [rows]: subtracted from a row it leaves log-probabilities."""


@dataclass(frozen=True)
class DecodeLimits:
    """The most that a decode model takes: rows, tokens of a source text, tokens of a translation."""

    rows: int
    source: int
    target: int


class DecodeModel(Protocol):
    """Encoder and decoder of a translation model, with rows: hypotheses, each at a position of its own, and its keys and
    values. The rows in use are the first ones. Not thread-safe: one caller at a time.

    ``rows_of_a_worker``: from twice as many rows on, models side by side beat this one alone. ``limits`` None: any size.
    ``pads``: texts encoded together take as long as if each were as long as the longest.
    """

    rows: int
    pads: bool

    def __init__(self, folder: Path, files: Sequence[str], threads: int, device: int = 0) -> None:
        """Load the encoder and the decoder, the first two of ``files``, for so many CPU threads or for the GPU of that
        number, whichever the engine runs on.

        Raises EngineError naming the file if the engine refuses it.
        """

    @property
    def limits(self) -> DecodeLimits | None: ...

    @property
    def vocabulary(self) -> int: ...

    @property
    def best(self) -> BestTokens: ...

    @property
    def rows_of_a_worker(self) -> int: ...

    def side_by_side(self, n: int) -> Sequence[DecodeModel]:
        """``n`` models of the same graphs, each with rows of its own and a share of the threads."""

    def encode(self, token_ids: Sequence[Sequence[int]]) -> Any:
        """Texts, encoded for ``admit``; good until the next ones are."""

    def reserve(self, rows: int, source: int) -> None:
        """Make room for ``rows`` rows in all, with texts of up to ``source`` tokens. It is kept until no row is left."""

    def admit(self, cross: Any, lengths: Sequence[int], copies: Sequence[int]) -> None:
        """Append empty rows: for each encoded text, of so many tokens, so many that attend to it."""

    def choose(self, tokens: NDArray[np.int64], choice: Choice) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Feed each row its next token; returns what ``select`` does of the logits."""

    def step(self, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        """Feed each row its next token; returns logits, float32 [rows, vocabulary].

        The array is the model's own: the next step overwrites it, and the caller may change it.
        """

    def copy(self, sources: NDArray[np.int64], targets: NDArray[np.int64], begin: int) -> None:
        """Make each of the rows ``targets`` continue what the one of ``sources``, of the same text, holds.

        They share the first ``begin`` positions; none of ``targets`` is in ``sources``.
        """

    def remove(self, gone: NDArray[np.int64]) -> NDArray[np.int64]:
        """Drop rows; the last ones move into their places. Returns, for each row left, its number before."""

    def cache_bytes(self, rows: int, target: int, source: int) -> int:
        """Memory that the caches of ``rows`` rows with that many target and source tokens take, beyond what the model
        takes in any case."""


@runtime_checkable
class TakesSteps(Protocol):
    """A decode model that goes on with a search by itself, for as long as the rules say the same."""

    def replace(self, rows: NDArray[np.int64], cross: Sequence[Any], lengths: Sequence[int]) -> None:
        """Give ``rows``, whose texts are over, others: encoded texts of so many tokens."""

    def run_greedily(self, texts: Texts, choice: Choice, most: int) -> int:
        """Append a token to each row, again and again: until one of them ends, but ``most`` times at most.

        Returns how many times.
        """

    def hold_beam(self, beam: Beam) -> HeldBeam | None:
        """``beam``, for ``run_beams``; None if it is too wide."""

    def run_beams(self, texts: Texts, choice: Choice, rows: NDArray[np.int64], beams: Sequence[Any], most: int) -> int:
        """Go on with beam search until that of one of the ``beams`` (``HeldBeam``) is over, but ``most`` steps at most.

        Returns how many.

        ``rows``: [sentences, beams], the hypotheses of each sentence, best first; it is changed.
        """


class HeldBeam(Protocol):
    """A beam in the hands of a decode model."""

    @property
    def done(self) -> bool:
        """Whether its search is over."""

    def give_back(self) -> Beam: ...


@dataclass(frozen=True)
class EngineInfo:
    """Where an engine's classes are, what it needs, and which graph of an export it runs.

    ``location`` is that of its ``Engine``, which runs ``graphs``; ``decoder`` that of its ``DecodeModel``, which runs
    ``translators``; where it has one. Any one of ``packages`` will do. What was ``built`` for the engine an export lists.
    """

    location: str = ""
    packages: tuple[str, ...] = ()
    extra: str = ""
    graphs: Mapping[Precision, str] = field(default_factory=dict)
    decoder: str = ""
    translators: Mapping[Precision, tuple[str, ...]] = field(default_factory=dict)
    built: bool = False
    gpu: bool = False

    @property
    def lacks(self) -> str | None:
        """What it needs and this machine does not have, if anything."""
        if self.packages and not any(importlib.util.find_spec(package) for package in self.packages):
            return "not installed"
        if self.gpu:
            return None if has_gpu() else "no GPU"
        return None if self.packages else native_lacks()

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


def available_cpus() -> int:
    """CPUs that this process may use (its affinity, as set by taskset or a container)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads_of_each(instances: int) -> int:
    """CPU threads of each of so many processes of a model, unless somebody says otherwise: twice the CPUs among them,
    because while one packs its answers, another may use them all."""
    return min(available_cpus(), max(1, 2 * available_cpus() // instances))
