"""TensorRT and TensorRT-RTX: engines that ``deploykit export --trt`` built, on an NVIDIA GPU.

An engine is tied to the version that built it and to a GPU; its record, the JSON file beside it, says which, and is
believed before the file is: nothing is deserialized that the record refuses.

A run of one shape, copies included, becomes a CUDA graph: whoever runs an engine allocates all memory at the start, for
the largest shapes, and copies and kernels always meet the same addresses. TensorRT-RTX compiles kernels for shapes as
they come, and captures graphs itself when they are ready.

Source: NVIDIA TensorRT documentation, "CUDA Graphs" (a context of its own for each captured graph, sharing device
memory), "Working with Dynamic Shapes"; TensorRT-RTX documentation, "Working with RTX CUDA Graphs".
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import json
import math
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping, MutableSequence, Reversible, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from deploykit.errors import CorruptArtifactError, DeploykitError, EngineError, MissingDependencyError
from deploykit.runtime.cuda import Buffer, DeviceMemory, Gpu, Graph, Stream

BINDINGS: Mapping[str, str] = {"tensorrt": "tensorrt", "trtexec": "tensorrt", "rtx": "tensorrt_rtx"}
"""The Python module that runs what each builder builds."""
_NAMES = {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT-RTX"}
_PACKAGES = {"tensorrt": "tensorrt", "tensorrt_rtx": "tensorrt-rtx"}
_LEAST_PORTABLE = {"tensorrt": 80, "tensorrt_rtx": 75}  # compute capability that "portable" engines begin at
_GRAPHS = (
    128  # jobs with a CUDA graph and a context of their own: 6 sizes of up to 32 rows, 16 buckets of up to 512 tokens
)

Shape = tuple[int, ...]


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
        return f"{self.command} --builder {self.builder} --gpu {target} --force"

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
    """Whether ``LoadedEngine`` would load ``file``, as far as its record says."""
    try:
        check(file, read_record(file), Gpu(device))
    except DeploykitError:
        return False
    return True


@dataclass(frozen=True)
class EngineProfile:
    """A profile of an engine: the least, the usual and the most that it takes of each axis."""

    number: int
    ranges: Mapping[str, tuple[int, int, int]]

    def takes(self, **axes: int) -> bool:
        return all(self.ranges[axis][0] <= n <= self.ranges[axis][2] for axis, n in axes.items())

    def most(self, axis: str) -> int:
        return self.ranges[axis][2]

    def filled(self, rows: int) -> int:
        """What ``rows`` are filled up to: a power of two where it can be, so that few shapes come, and come again."""
        least, _, most = self.ranges["rows"]
        return min(max(1 << (rows - 1).bit_length(), least), most)

    def size(self) -> int:
        return math.prod(most for _, _, most in self.ranges.values())


@dataclass(frozen=True, eq=False)
class Job:
    """A run of an engine that can be repeated: under a profile, with these shapes of inputs, and tensors at these addresses.

    ``uploads`` are copied to the GPU before it, ``downloads`` to the host after it, each with how many bytes. Jobs of
    different ``lane``s, which follow on one another, keep contexts apart. ``told`` is what an error calls it.
    """

    profile: int
    shapes: Mapping[str, Shape]
    addresses: Mapping[str, int]
    uploads: Sequence[tuple[Buffer, int]]
    downloads: Sequence[tuple[Buffer, int]]
    told: str
    lane: int = 0


class LoadedEngine:
    """The engine in ``file``, with its record beside it, on a GPU: that of number ``device``, or ``beside`` another
    engine, with which it then shares a ``stream``. One caller at a time, in a thread that has entered the ``gpu``.

    ``inputs`` and ``outputs`` are names, in the engine's order. Raises EngineError, CorruptArtifactError or
    MissingDependencyError, with the command that builds it again, when it cannot run here.
    """

    def __init__(self, file: Path, device: int = 0, *, beside: LoadedEngine | None = None) -> None:
        self.file, self.record = file, read_record(file)
        self.gpu: Gpu = beside.gpu if beside else Gpu(device)
        trt = check(file, self.record, self.gpu)
        plan = file.read_bytes()
        if hashlib.sha256(plan).hexdigest() != self.record.sha256:
            raise CorruptArtifactError(
                f"{file}: its SHA-256 differs from its record's", f"copy it again, or: {self.record.rebuild()}"
            )
        self.gpu.enter()
        self._said: deque[str] = deque(maxlen=50)
        self._log = make_log(trt, self._said)
        try:
            self._runtime = trt.Runtime(self._log)
            self._engine = self._runtime.deserialize_cuda_engine(plan)
        except TypeError:  # how the bindings say that TensorRT gave no object
            self._engine = None
        if self._engine is None:
            raise self._failed("cannot be loaded", f"update the driver, or build it again: {self.record.rebuild()}")
        self.stream: Stream = beside.stream if beside else Stream(self.gpu)
        self._new_context = _contexts(trt, self._engine, DeviceMemory(self.gpu, self._engine.device_memory_size_v2))
        self._captures = not hasattr(trt, "CudaGraphStrategy")
        self._replays: OrderedDict[Job, _Replay | None] = OrderedDict()
        self._contexts: dict[tuple[int, int], Any] = {}  # by profile and lane
        self._prepared: dict[tuple[int, int], Job] = {}  # for which job each of them is
        self._trt = trt
        names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        self.inputs = [name for name in names if self._engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
        self.outputs = [name for name in names if name not in self.inputs]

    def shape(self, name: str) -> Shape:
        """Of a tensor; -1 where it varies."""
        return tuple(self._engine.get_tensor_shape(name))

    def dtype(self, name: str) -> np.dtype[Any]:
        """Raises TypeError for a tensor of a type that numpy does not have."""
        return np.dtype(self._trt.nptype(self._engine.get_tensor_dtype(name)))

    def itemsize(self, name: str) -> int:
        return int(self._engine.get_tensor_dtype(name).itemsize)

    def profiles(self, dimensions: Mapping[str, Sequence[str | int]]) -> list[EngineProfile]:
        """Its profiles, the smallest first, as ranges of axes: ``dimensions`` are the inputs', numbers or names of axes.

        Raises EngineError naming two inputs that disagree.
        """
        profiles = []
        for number in range(self._engine.num_optimization_profiles):
            ranges: dict[str, tuple[int, int, int]] = {}
            first: dict[str, str] = {}
            for name in self.inputs:
                shapes = [tuple(shape) for shape in self._engine.get_tensor_profile_shape(name, number)]
                for axis, (least, usual, most) in zip(dimensions[name], zip(*shapes)):
                    if isinstance(axis, int):
                        continue
                    if ranges.setdefault(axis, (least, usual, most)) != (least, usual, most):
                        raise EngineError(
                            f"{self.file}: {first[axis]} and {name} disagree in profile {number}",
                            f"build it again: {self.record.rebuild()}",
                        )
                    first.setdefault(axis, name)
            profiles.append(EngineProfile(number, ranges))
        return sorted(profiles, key=EngineProfile.size)

    def output_shapes(self, profile: int, shapes: Mapping[str, Shape]) -> dict[str, Shape]:
        """Of the outputs by name, in their order, for inputs of these ``shapes``."""
        context = self._context(profile, 0)
        self._prepared.pop((profile, 0), None)
        self._set_shapes(context, shapes)
        return {name: tuple(context.get_tensor_shape(name)) for name in self.outputs}

    def run(self, job: Job) -> None:
        """Put it into the stream; the first time perhaps twice, so it must write nothing that it reads."""
        replay = self._replay(job) if self._captures else None
        if replay is not None:
            replay.graph.launch(self.stream)
            return
        context, key = self._context(job.profile, job.lane), (job.profile, job.lane)
        if self._prepared.get(key) is not job:
            self._prepare(context, job)
            self._prepared[key] = job
        self._enqueue(context, job)

    def too_long(self, what: str, remedy: str) -> EngineError:
        """What to raise for a shape that no profile takes."""
        profiles = "; ".join(self.record.profiles)
        return EngineError(
            f"{self.file}: no profile takes {what} (it has {profiles})",
            f"build it again with {remedy}: {self.record.rebuild()}",
        )

    def _replay(self, job: Job) -> _Replay | None:
        """The CUDA graph of a job; None for an engine that cannot be captured."""
        if job not in self._replays:
            context = self._open(job.profile)
            self._prepare(context, job)
            self._enqueue(context, job)  # settles what a new shape changes: none of it may be captured
            self.stream.synchronize()
            graph = self.stream.capture(lambda: self._enqueue(context, job))
            self._replays[job] = None if graph is None else _Replay(context, graph)
            if len(self._replays) > _GRAPHS:
                self._replays.popitem(last=False)
        self._replays.move_to_end(job)
        return self._replays[job]

    def _enqueue(self, context: Any, job: Job) -> None:
        for buffer, size in job.uploads:
            buffer.upload(size, self.stream)
        if not context.execute_async_v3(self.stream.handle):
            raise self._failed(f"did not run {job.told}")
        for buffer, size in job.downloads:
            buffer.download(size, self.stream)

    def _context(self, profile: int, lane: int) -> Any:
        if (profile, lane) not in self._contexts:
            self._contexts[profile, lane] = self._open(profile)
        return self._contexts[profile, lane]

    def _open(self, profile: int) -> Any:
        """A context that runs ``profile``."""
        context = self._new_context()
        if context is None or not context.set_optimization_profile_async(profile, self.stream.handle):
            raise self._failed(f"gives no context for profile {profile}")
        self.stream.synchronize()
        return context

    def _prepare(self, context: Any, job: Job) -> None:
        self._set_shapes(context, job.shapes)
        for name, address in job.addresses.items():
            if not context.set_tensor_address(name, address):
                raise self._failed(f"takes no address for {name}")

    def _set_shapes(self, context: Any, shapes: Mapping[str, Shape]) -> None:
        for name, shape in shapes.items():
            if not context.set_input_shape(name, shape):
                raise self._failed(f"does not take {list(shape)} as {name}")

    def _failed(self, what: str, remedy: str = "check nvidia-smi; restart the process") -> EngineError:
        return EngineError(f"{self.file}: {what}: {last_error(self._said)}", remedy)


@dataclass(frozen=True)
class _Replay:
    """``graph`` holds good while ``context`` stays as it was."""

    context: Any
    graph: Graph


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
