"""TensorRT and TensorRT-RTX: engines that ``deploykit export --trt`` built, on an NVIDIA GPU.

An engine is tied to the version that built it and to a GPU; its record, the JSON file beside it, says which, and is
believed before the file is: nothing is deserialized that the record refuses.

All memory is allocated at the start, for the largest shapes: copies and kernels always meet the same addresses. So a
whole run of a shape, copies included, becomes a CUDA graph. TensorRT-RTX compiles kernels for shapes as they come,
and captures graphs itself when they are ready.

Source: NVIDIA TensorRT documentation, "CUDA Graphs" (a context of its own for each captured graph, sharing device
memory), "Working with Dynamic Shapes"; TensorRT-RTX documentation, "Working with RTX CUDA Graphs".
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import json
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping, MutableSequence, Reversible
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deploykit.errors import CorruptArtifactError, DeploykitError, EngineError, MissingDependencyError
from deploykit.runtime.cuda import Buffer, DeviceMemory, Gpu, Graph, Stream

BINDINGS: Mapping[str, str] = {"tensorrt": "tensorrt", "trtexec": "tensorrt", "rtx": "tensorrt_rtx"}
"""The Python module that runs what each builder builds."""
_NAMES = {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT-RTX"}
_PACKAGES = {"tensorrt": "tensorrt", "tensorrt_rtx": "tensorrt-rtx"}
_LEAST_PORTABLE = {"tensorrt": 80, "tensorrt_rtx": 75}  # compute capability that "portable" engines begin at
_GRAPHS = (
    128  # shapes with a CUDA graph and a context of their own: 6 sizes of up to 32 rows, 16 buckets of up to 512 tokens
)


@dataclass(frozen=True)
class EngineRecord:
    """A built engine: what made it, for what, and of what types its layers are.

    ``version`` is the builder's, ``target`` ``portable`` or the compute capability that it runs on. ``layers`` counts
    them by kind and the type that they read, ``int8_gemms`` those that multiply INT8 matrices, each profile's own
    ones; there are none where the builder tells nothing. ``sha256`` is the engine's, ``graph_digest`` the ONNX file's,
    ``calibration`` that of the ranges of an INT8 engine. ``command`` makes the export again, but for builder and target.
    """

    file: str
    graph: str
    graph_digest: str
    precision: str
    builder: str
    version: str
    target: str
    profiles: tuple[str, ...]
    workspace_bytes: int
    seconds: float
    size_bytes: int
    sha256: str
    command: str
    calibration: str | None = None
    layers: Mapping[str, int] = field(default_factory=dict)
    int8_gemms: int = 0

    @property
    def module(self) -> str:
        """The bindings that run it."""
        return BINDINGS[self.builder]

    @property
    def requirement(self) -> str:
        """What to give pip for the bindings of its version."""
        package = _PACKAGES[self.module]
        return package if self.version == "unknown" else f"{package}=={self.version}"

    def rebuild(self, target: str | None = None) -> str:
        """The command that builds it again with what is installed, for ``target`` in place of its own."""
        target = target or (self.target if self.builder == "rtx" or self.target == "portable" else "this-gpu")
        return f"{self.command} --builder {self.builder} --target {target} --force"

    def save(self, file: Path) -> None:
        record_path(file).write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n", encoding="utf-8")


def record_path(file: Path) -> Path:
    """Where the record of an engine stands."""
    return file.with_suffix(".json")


def read_record(file: Path) -> EngineRecord:
    """Raises EngineError when there is none, CorruptArtifactError when it cannot be read."""
    path = record_path(file)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        record = EngineRecord(**{**values, "profiles": tuple(values["profiles"])})
        if record.builder not in BINDINGS:
            raise ValueError(f"unknown builder {record.builder}")
    except FileNotFoundError:
        raise EngineError(f"{path}: no such file, so nobody knows what {file.name} is for", "export it again") from None
    except (ValueError, TypeError, KeyError) as error:
        raise CorruptArtifactError(f"{path}: is not an engine's record: {error}", "export it again") from error
    return record


def check(file: Path, record: EngineRecord, gpu: Gpu) -> Any:
    """The bindings that run ``file`` on ``gpu``.

    Raises MissingDependencyError when they are not installed, EngineError with the command that builds the engine
    again when it was built by another version of them or for another GPU.
    """
    name = _NAMES[record.module]
    try:
        trt = importlib.import_module(record.module)
    except (ImportError, OSError) as error:
        raise MissingDependencyError(
            f"{file}: {name} {record.version} is not installed, which built it: {error}",
            f"pip install {record.requirement}",
        ) from error
    if record.version != "unknown" and _release(record.version) != _release(trt.__version__):
        raise EngineError(
            f"{file}: was built by {name} {record.version}, here is {trt.__version__}: neither runs the other's engines",
            f"pip install {record.requirement}, or build it again: {record.rebuild()}",
        )
    here = int(gpu.capability.removeprefix("sm_"))
    fits = here >= _LEAST_PORTABLE[record.module] if record.target == "portable" else gpu.capability == record.target
    if not fits:
        raise EngineError(
            f"{file}: was built for {record.target}, this GPU ({gpu.name}) is {gpu.capability}",
            f"build it again here: {record.rebuild('this-gpu')}",
        )
    return trt


def runs_here(file: Path, device: int = 0) -> bool:
    """Whether ``TensorRtEngine`` would load ``file``, as far as its record says."""
    try:
        check(file, read_record(file), Gpu(device))
    except DeploykitError:
        return False
    return True


class TensorRtEngine:
    """``graph`` is an engine with its record beside it; ``threads`` are of no use to a GPU."""

    def __init__(self, graph: Path, threads: int, device: int = 0) -> None:
        self._file, self._record = graph, read_record(graph)
        self._gpu = Gpu(device)
        trt = check(graph, self._record, self._gpu)
        plan = graph.read_bytes()
        if hashlib.sha256(plan).hexdigest() != self._record.sha256:
            raise CorruptArtifactError(
                f"{graph}: its SHA-256 differs from its record's", f"copy it again, or: {self._record.rebuild()}"
            )
        self._gpu.enter()
        self._said: deque[str] = deque(maxlen=50)
        self._log = make_log(trt, self._said)
        try:
            self._runtime = trt.Runtime(self._log)
            self._engine = self._runtime.deserialize_cuda_engine(plan)
        except TypeError:  # how the bindings say that TensorRT gave no object
            self._engine = None
        if self._engine is None:
            raise self._failed("cannot be loaded", f"update the driver, or build it again: {self._record.rebuild()}")
        self._stream = Stream(self._gpu)
        self._new_context = _contexts(trt, self._engine, DeviceMemory(self._gpu, self._engine.device_memory_size_v2))
        self._captures = not hasattr(trt, "CudaGraphStrategy")
        self._replays: OrderedDict[tuple[int, int, int], _Replay | None] = OrderedDict()

        names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        inputs = [name for name in names if self._engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
        self._types = {name: np.dtype(trt.nptype(self._engine.get_tensor_dtype(name))) for name in names}
        self._profiles = [
            _Profile(i, *(tuple(shape) for shape in self._engine.get_tensor_profile_shape(inputs[0], i)))
            for i in range(self._engine.num_optimization_profiles)
        ]
        self._inputs, self._outputs = inputs, [name for name in names if name not in inputs]
        for name in inputs:
            for profile in self._profiles:
                shapes = [tuple(shape) for shape in self._engine.get_tensor_profile_shape(name, profile.number)]
                if shapes != [profile.least, profile.usual, profile.most]:
                    raise EngineError(
                        f"{graph}: {inputs[0]} and {name} disagree in profile {profile.number}",
                        f"build it again: {self._record.rebuild()}",
                    )
        self._contexts = [self._open(profile) for profile in self._profiles]
        self._buffers = {name: Buffer(self._gpu, size) for name, size in self._largest().items()}
        for context in self._contexts:
            self._bind(context)
        self.token_budget = max(rows * length for rows, length in (profile.most for profile in self._profiles))

    def run(self, inputs: Mapping[str, NDArray[np.int64]]) -> list[NDArray[Any]]:
        """More rows than any profile takes are run in parts. Raises EngineError naming a shape that none takes."""
        rows, length = next(iter(inputs.values())).shape
        most = max((p.most[0] for p in self._profiles if p.takes(length)), default=0)
        if not most:
            raise EngineError(
                f"{self._file}: no profile takes texts padded to {length} tokens (it has "
                f"{'; '.join(self._record.profiles)})",
                f"build it again with a longer --profile: {self._record.rebuild()}",
            )
        self._gpu.enter()
        parts = [self._run({n: a[i : i + most] for n, a in inputs.items()}, length) for i in range(0, rows, most)]
        return parts[0] if len(parts) == 1 else [np.concatenate(part) for part in zip(*parts)]

    def int8_kernels(self) -> int:
        """From the builder's log: an engine does not tell."""
        return self._record.int8_gemms

    def _run(self, inputs: Mapping[str, NDArray[np.int64]], length: int) -> list[NDArray[Any]]:
        given = len(next(iter(inputs.values())))
        profile = min((p for p in self._profiles if p.takes(length) and given <= p.most[0]), key=_Profile.tokens)
        rows = profile.filled(given)
        for name in self._inputs:
            view = self._buffers[name].view((rows, length), self._types[name])
            view[:given], view[given:] = inputs[name], inputs[name][-1:]
        replay = self._replay(profile, rows, length) if self._captures else None
        if replay is not None:
            shapes = replay.shapes
            replay.graph.launch(self._stream)
        else:
            context = self._contexts[profile.number]
            shapes = self._shape(context, rows, length)
            self._enqueue(context, rows, length, shapes)
        self._stream.synchronize()
        return [self._buffers[name].view(shape, self._types[name])[:given].copy() for name, shape in shapes.items()]

    def _replay(self, profile: _Profile, rows: int, length: int) -> _Replay | None:
        """The CUDA graph of a shape; None for an engine that cannot be captured."""
        key = (profile.number, rows, length)
        if key not in self._replays:
            context = self._open(profile)
            self._bind(context)
            shapes = self._shape(context, rows, length)
            self._enqueue(context, rows, length, shapes)  # settles what a new shape changes: none of it may be captured
            self._stream.synchronize()
            graph = self._stream.capture(lambda: self._enqueue(context, rows, length, shapes))
            self._replays[key] = None if graph is None else _Replay(context, graph, shapes)
            if len(self._replays) > _GRAPHS:
                self._replays.popitem(last=False)
        self._replays.move_to_end(key)
        return self._replays[key]

    def _enqueue(self, context: Any, rows: int, length: int, shapes: Mapping[str, tuple[int, ...]]) -> None:
        for name in self._inputs:
            self._buffers[name].upload(rows * length * self._types[name].itemsize, self._stream)
        if not context.execute_async_v3(self._stream.handle):
            raise self._failed(f"did not run {rows} rows of {length} tokens")
        for name, shape in shapes.items():
            self._buffers[name].download(int(np.prod(shape)) * self._types[name].itemsize, self._stream)

    def _open(self, profile: _Profile) -> Any:
        """A context that runs ``profile``."""
        context = self._new_context()
        if context is None or not context.set_optimization_profile_async(profile.number, self._stream.handle):
            raise self._failed(f"gives no context for profile {profile.number}")
        self._stream.synchronize()
        return context

    def _bind(self, context: Any) -> None:
        for name, buffer in self._buffers.items():
            if not context.set_tensor_address(name, buffer.address):
                raise self._failed(f"takes no address for {name}")

    def _shape(self, context: Any, rows: int, length: int) -> dict[str, tuple[int, ...]]:
        """Set the inputs' shape; returns the outputs' by name, in their order."""
        for name in self._inputs:
            if not context.set_input_shape(name, (rows, length)):
                raise self._failed(f"does not take {rows} rows of {length} tokens as {name}")
        return {name: tuple(context.get_tensor_shape(name)) for name in self._outputs}

    def _largest(self) -> dict[str, int]:
        """Bytes of each tensor, under whichever profile it is largest."""
        sizes: dict[str, int] = {}
        for profile, context in zip(self._profiles, self._contexts):
            outputs = self._shape(context, *profile.most)
            for name, shape in {**dict.fromkeys(self._inputs, profile.most), **outputs}.items():
                sizes[name] = max(sizes.get(name, 0), int(np.prod(shape)) * self._types[name].itemsize)
        return sizes

    def _failed(self, what: str, remedy: str = "check nvidia-smi; restart the process") -> EngineError:
        return EngineError(f"{self._file}: {what}: {last_error(self._said)}", remedy)


@dataclass(frozen=True)
class _Profile:
    """The shapes, [rows, length], that a profile of the engine takes."""

    number: int
    least: tuple[int, int]
    usual: tuple[int, int]
    most: tuple[int, int]

    def takes(self, length: int) -> bool:
        return self.least[1] <= length <= self.most[1]

    def filled(self, rows: int) -> int:
        """What ``rows`` are filled up to: a power of two where it can be, so that few shapes come, and come again."""
        return min(max(1 << (rows - 1).bit_length(), self.least[0]), self.most[0])

    def tokens(self) -> int:
        return self.most[0] * self.most[1]


@dataclass(frozen=True)
class _Replay:
    """``graph`` holds good while ``context`` stays as it was; ``shapes`` are the outputs'."""

    context: Any
    graph: Graph
    shapes: Mapping[str, tuple[int, ...]]


def _contexts(trt: Any, engine: Any, memory: DeviceMemory) -> Callable[[], Any]:
    """A function that makes contexts. They compute in the same ``memory``: only one runs at a time."""
    strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED

    def new() -> Any:
        if hasattr(trt, "CudaGraphStrategy"):
            config = engine.create_runtime_config()
            config.set_execution_context_allocation_strategy(strategy)
            config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
            context = engine.create_execution_context(config)
        else:
            context = engine.create_execution_context(strategy)
        if context is not None:
            context.set_device_memory(memory.address, memory.size)
        return context

    return new


def make_log(trt: Any, lines: MutableSequence[str]) -> Any:
    """A logger for ``trt`` that appends to ``lines`` and prints nothing."""

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            prefix = "" if severity in (trt.ILogger.VERBOSE, trt.ILogger.INFO) else f"{severity.name}: "
            lines.extend((prefix + message).splitlines())

    return Log()


def last_error(lines: Reversible[str]) -> str:
    """What a log says of the last failure."""
    errors = (line.removeprefix("ERROR: ") for line in reversed(lines) if line.startswith(("ERROR", "INTERNAL")))
    return next(errors, "it gives no reason")


def _release(version: str) -> tuple[str, ...]:
    """What must agree: trtexec does not tell the build number."""
    return tuple(version.split(".")[:3])
