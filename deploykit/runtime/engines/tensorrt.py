"""TensorRT and TensorRT-RTX: run engines that ``deploykit export --trt`` built, on an NVIDIA GPU.

An engine is tied to the version that built it and to a GPU, both named in the JSON record next to it. The record is
checked first: an engine that cannot run here is never deserialized.

Each run of one shape, copies included, becomes a CUDA graph. This works because callers allocate all memory at the
start, for the largest shapes, so that copies and kernels always use the same addresses. TensorRT-RTX compiles kernels
for shapes as they occur, and captures its own graphs when they are ready.

Source: NVIDIA TensorRT documentation, "CUDA Graphs" (one context for each captured graph, all sharing device memory),
"Working with Dynamic Shapes"; TensorRT-RTX documentation, "Working with RTX CUDA Graphs".
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
from typing import TYPE_CHECKING, Any

from deploykit.errors import CorruptArtifactError, DeploykitError, EngineError, MissingDependencyError
from deploykit.runtime.cuda import Buffer, DeviceMemory, Gpu, Graph, Stream

if TYPE_CHECKING:
    import numpy as np

BINDINGS: Mapping[str, str] = {"tensorrt": "tensorrt", "trtexec": "tensorrt", "rtx": "tensorrt_rtx"}
"""Builder -> the Python module that runs its engines."""
_NAMES = {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT-RTX"}
_PACKAGES = {"tensorrt": "tensorrt", "tensorrt_rtx": "tensorrt-rtx"}
_LEAST_PORTABLE = {"tensorrt": 80, "tensorrt_rtx": 75}  # lowest compute capability that runs "portable" engines
_GRAPHS = (
    128  # maximum jobs with their own CUDA graph and context: 6 sizes of up to 32 rows, 16 buckets of up to 512 tokens
)

Shape = tuple[int, ...]


@dataclass(frozen=True)
class EngineRecord:
    """A built engine: how it was built, for which target, and the types of its layers.

    - ``builder``, ``version``: the builder and its version.
    - ``target``: ``portable``, or the compute capability that the engine runs on.
    - ``layers``: number of layers by kind and input type; ``int8_gemms``: INT8 matrix products, counted for each
      profile.
      Both are empty if the builder does not report them.
    - ``sha256``: of the engine; ``graph_digest``: of the ONNX file; ``calibration``: of the ranges of an INT8 engine.
    - ``command``: repeats the export, without builder and target.
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
        """The Python bindings that run the engine."""
        return BINDINGS[self.builder]

    @property
    def requirement(self) -> str:
        """The pip requirement for the bindings in the engine's version."""
        package = _PACKAGES[self.module]
        return package if self.version == "unknown" else f"{package}=={self.version}"

    def rebuild(self, target: str | None = None) -> str:
        """Return the command that builds the engine again with the installed version, optionally for another
        ``target``.
        """
        target = target or (self.target if self.builder == "rtx" or self.target == "portable" else "this-gpu")
        return f"{self.command} --builder {self.builder} --gpu {target} --force"

    def save(self, file: Path) -> None:
        """Write the record next to the engine ``file``."""
        record_path(file).write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n", encoding="utf-8")


def record_path(file: Path) -> Path:
    """Return the path of an engine's record."""
    return file.with_suffix(".json")


def read_record(file: Path) -> EngineRecord:
    """Read an engine's record. Raises EngineError if there is none, CorruptArtifactError if it is unreadable."""
    path = record_path(file)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        record = EngineRecord(**{**values, "profiles": tuple(values["profiles"])})
        if record.builder not in BINDINGS:
            raise ValueError(f"unknown builder {record.builder}")
    except FileNotFoundError:
        raise EngineError(
            f"{path}: no such file; {file.name} cannot be used without it", "copy it again, or export the model again"
        ) from None
    except (ValueError, TypeError, KeyError) as error:
        raise CorruptArtifactError(
            f"{path}: is not an engine's record: {error}", "copy it again, or export the model again"
        ) from error
    return record


def check(file: Path, record: EngineRecord, gpu: Gpu) -> Any:
    """Return the bindings that run ``file`` on ``gpu``.

    Raises MissingDependencyError when they are not installed. Raises EngineError, with the command that builds the
    engine again, when another version built it or it is for another GPU.
    """
    name = _NAMES[record.module]
    try:
        trt = importlib.import_module(record.module)
    except (ImportError, OSError) as error:
        raise MissingDependencyError(
            f"{file}: was built by {name} {record.version}, which is not installed: {error}",
            f"pip install {record.requirement}",
        ) from error
    if record.version != "unknown" and _release(record.version) != _release(trt.__version__):
        raise EngineError(
            f"{file}: was built by {name} {record.version}; the installed version, {trt.__version__}, cannot run it",
            f"pip install {record.requirement}, or build it again: {record.rebuild()}",
        )
    here = int(gpu.capability.removeprefix("sm_"))
    fits = here >= _LEAST_PORTABLE[record.module] if record.target == "portable" else gpu.capability == record.target
    if not fits:
        raise EngineError(
            f"{file}: was built for {record.target}, but this GPU ({gpu.name}) is {gpu.capability}",
            f"build it again here: {record.rebuild('this-gpu')}",
        )
    return trt


def runs_here(file: Path, device: int = 0) -> bool:
    """Return whether ``LoadedEngine`` would load ``file``, judging by its record."""
    try:
        check(file, read_record(file), Gpu(device))
    except DeploykitError:
        return False
    return True


@dataclass(frozen=True)
class EngineProfile:
    """A profile of an engine: smallest, usual and largest size of each axis."""

    number: int
    ranges: Mapping[str, tuple[int, int, int]]

    def takes(self, **axes: int) -> bool:
        """Return whether all given sizes are within the profile."""
        return all(self.ranges[axis][0] <= n <= self.ranges[axis][2] for axis, n in axes.items())

    def most(self, axis: str) -> int:
        return self.ranges[axis][2]

    def filled(self, rows: int) -> int:
        """Return the number of rows to pad ``rows`` to: a power of two if possible, so that few shapes occur."""
        least, _, most = self.ranges["rows"]
        return min(max(1 << (rows - 1).bit_length(), least), most)

    def size(self) -> int:
        """Return the product of the largest sizes of all axes."""
        return math.prod(most for _, _, most in self.ranges.values())


@dataclass(frozen=True, eq=False)
class Job:
    """A repeatable run of an engine: profile, input shapes, and tensor addresses.

    ``uploads`` are copied to the GPU before the run and ``downloads`` to the host after it, each with a number of
    bytes. Consecutive jobs of different ``lane``s use separate contexts. ``description`` is for errors.
    """

    profile: int
    shapes: Mapping[str, Shape]
    addresses: Mapping[str, int]
    uploads: Sequence[tuple[Buffer, int]]
    downloads: Sequence[tuple[Buffer, int]]
    description: str
    lane: int = 0


class LoadedEngine:
    """The engine in ``file``, loaded on GPU ``device``, or with ``beside`` on the GPU of another engine, whose ``stream`` it
    shares.

    One caller at a time, in a thread that has entered the ``gpu``. ``inputs`` and ``outputs`` are names, in the
    engine's order. Raises EngineError, CorruptArtifactError or MissingDependencyError, with the command that builds the
    engine again, when it cannot run here.
    """

    def __init__(self, file: Path, device: int = 0, *, beside: LoadedEngine | None = None) -> None:
        self.file, self.record = file, read_record(file)
        self.gpu: Gpu = beside.gpu if beside else Gpu(device)
        trt = check(file, self.record, self.gpu)
        plan = file.read_bytes()
        if hashlib.sha256(plan).hexdigest() != self.record.sha256:
            raise CorruptArtifactError(
                f"{file}: its SHA-256 differs from its record's",
                f"copy it again, or build it again: {self.record.rebuild()}",
            )
        self.gpu.enter()
        self._log_lines: deque[str] = deque(maxlen=50)
        self._log = make_log(trt, self._log_lines)
        try:
            self._runtime = trt.Runtime(self._log)
            self._engine = self._runtime.deserialize_cuda_engine(plan)
        except TypeError:  # the bindings raise this when TensorRT returns no object
            self._engine = None
        if self._engine is None:
            raise self._failed("cannot be loaded", f"update the driver, or build it again: {self.record.rebuild()}")
        self.stream: Stream = beside.stream if beside else Stream(self.gpu)
        self._new_context = _contexts(trt, self._engine, DeviceMemory(self.gpu, self._engine.device_memory_size_v2))
        self._captures = not hasattr(trt, "CudaGraphStrategy")
        self._replays: OrderedDict[Job, _Replay | None] = OrderedDict()
        self._contexts: dict[tuple[int, int], Any] = {}  # (profile, lane) -> context
        self._prepared: dict[tuple[int, int], Job] = {}  # (profile, lane) -> the job that the context is prepared for
        self._trt = trt
        names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        self.inputs = [name for name in names if self._engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
        self.outputs = [name for name in names if name not in self.inputs]

    def shape(self, name: str) -> Shape:
        """Return the shape of a tensor; -1 for a variable axis."""
        return tuple(self._engine.get_tensor_shape(name))

    def dtype(self, name: str) -> np.dtype[Any]:
        """Return the type of a tensor. Raises TypeError if numpy has no such type."""
        import numpy as np

        return np.dtype(self._trt.nptype(self._engine.get_tensor_dtype(name)))

    def itemsize(self, name: str) -> int:
        return int(self._engine.get_tensor_dtype(name).itemsize)

    def profiles(self, dimensions: Mapping[str, Sequence[str | int]]) -> list[EngineProfile]:
        """Return the profiles, smallest first, as ranges of axes.

        ``dimensions`` gives, for each input, a number or the name of an axis for each dimension. Raises EngineError
        naming two inputs that disagree.
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
        """Return the shape of each output, in the engine's order, for inputs of these ``shapes``."""
        context = self._context(profile, 0)
        self._prepared.pop((profile, 0), None)
        self._set_shapes(context, shapes)
        return {name: tuple(context.get_tensor_shape(name)) for name in self.outputs}

    def run(self, job: Job) -> None:
        """Enqueue ``job``. The first time it may run twice, so it must not overwrite its inputs."""
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
        """Return the error for a shape that no profile accepts."""
        profiles = "; ".join(self.record.profiles)
        return EngineError(
            f"{self.file}: no profile allows {what} (profiles: {profiles})",
            f"build it again with {remedy}: {self.record.rebuild()}",
        )

    def _replay(self, job: Job) -> _Replay | None:
        """Return the CUDA graph of a job; None if the engine cannot be captured."""
        if job not in self._replays:
            context = self._open(job.profile)
            self._prepare(context, job)
            self._enqueue(context, job)  # a first run, because the work for a new shape must not be captured
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
            raise self._failed(f"did not run {job.description}")
        for buffer, size in job.downloads:
            buffer.download(size, self.stream)

    def _context(self, profile: int, lane: int) -> Any:
        if (profile, lane) not in self._contexts:
            self._contexts[profile, lane] = self._open(profile)
        return self._contexts[profile, lane]

    def _open(self, profile: int) -> Any:
        """Create a context for ``profile``."""
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
        return EngineError(f"{self.file}: {what}: {last_error(self._log_lines)}", remedy)


@dataclass(frozen=True)
class _Replay:
    """A captured ``graph``, valid as long as its ``context`` does not change."""

    context: Any
    graph: Graph


def _contexts(trt: Any, engine: Any, memory: DeviceMemory) -> Callable[[], Any]:
    """Return a function that creates contexts. All use the same ``memory``, so only one may run at a time."""
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
    """Return a logger for ``trt`` that appends to ``lines`` and prints nothing."""

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            prefix = "" if severity in (trt.ILogger.VERBOSE, trt.ILogger.INFO) else f"{severity.name}: "
            lines.extend((prefix + message).splitlines())

    return Log()


def last_error(lines: Reversible[str]) -> str:
    """Return the last error in a log."""
    errors = (line.removeprefix("ERROR: ") for line in reversed(lines) if line.startswith(("ERROR", "INTERNAL")))
    return next(errors, "no reason given")


def _release(version: str) -> tuple[str, ...]:
    """Return the part of a version that must match; trtexec does not report the build number."""
    return tuple(version.split(".")[:3])
