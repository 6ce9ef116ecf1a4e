"""A fake GPU of numpy arrays: NVIDIA's driver as a library of C functions, and TensorRT's bindings on top of it.

The driver's functions are real C callbacks with the signatures of cuda.h, so that arguments pass through ctypes as with
the real driver. Work is done only when its stream is synchronized. Every method and argument of the bindings is checked
against pybind's signatures of the installed TensorRT-RTX. An engine is an ONNX graph with profiles, run by ONNX
Runtime.
"""

from __future__ import annotations

import ast
import ctypes
import functools
import hashlib
import importlib.machinery
import json
import re
import sys
import threading
import types
from collections.abc import Callable, Mapping, Sequence
from ctypes import POINTER, c_char_p, c_int, c_size_t, c_ubyte, c_uint, c_uint64, c_void_p
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from deploykit.runtime import cuda, engines
from deploykit.runtime.engines.tensorrt import EngineRecord
from deploykit.tensorrt import build as tensorrt
from deploykit.tensorrt.build import CLASSIFIER_INPUTS, Inputs

real = pytest.importorskip("tensorrt_rtx", reason="the extra rtx is not installed")

# cuda.h of CUDA 12.9, as cuda-bindings' cydriver.pxd declares it.
HEADER: dict[str, tuple[Any, ...]] = {
    "cuInit": (c_uint,),
    "cuGetErrorString": (c_int, POINTER(c_char_p)),
    "cuDeviceGetCount": (POINTER(c_int),),
    "cuDeviceGet": (POINTER(c_int), c_int),
    "cuDeviceGetName": (c_void_p, c_int, c_int),
    "cuDeviceGetAttribute": (POINTER(c_int), c_int, c_int),
    "cuDevicePrimaryCtxRetain": (POINTER(c_void_p), c_int),
    "cuCtxSetCurrent": (c_void_p,),
    "cuMemAlloc_v2": (POINTER(c_uint64), c_size_t),
    "cuMemFree_v2": (c_uint64,),
    "cuMemAllocHost_v2": (POINTER(c_void_p), c_size_t),
    "cuMemFreeHost": (c_void_p,),
    "cuMemcpyHtoDAsync_v2": (c_uint64, c_void_p, c_size_t, c_void_p),
    "cuMemcpyDtoHAsync_v2": (c_void_p, c_uint64, c_size_t, c_void_p),
    "cuMemcpy3DAsync_v2": (c_void_p, c_void_p),
    "cuMemsetD8Async": (c_uint64, c_ubyte, c_size_t, c_void_p),
    "cuStreamCreate": (POINTER(c_void_p), c_uint),
    "cuStreamDestroy_v2": (c_void_p,),
    "cuStreamSynchronize": (c_void_p,),
    "cuStreamBeginCapture_v2": (c_void_p, c_int),
    "cuStreamEndCapture": (c_void_p, POINTER(c_void_p)),
    "cuGraphInstantiateWithFlags": (POINTER(c_void_p), c_void_p, c_uint64),
    "cuGraphLaunch": (c_void_p, c_void_p),
    "cuGraphExecDestroy": (c_void_p,),
    "cuGraphDestroy": (c_void_p,),
}
INVALID_VALUE, OUT_OF_MEMORY, INVALID_CONTEXT, CAPTURE_INVALIDATED = 1, 2, 201, 901

# CUDA_MEMCPY3D as words of 8 bytes: the source from 0 on, the target from 11 on, then the extent.
_MEMORY_TYPE, _HOST, _ADDRESS, _ARRAY, _PITCH, _HEIGHT = 4, 5, 6, 7, 9, 10
_DEVICE = 2  # CU_MEMORYTYPE_DEVICE

Work = Callable[[], None]


class FakeDriver:
    """libcuda.so.1 and its GPUs. ``counts`` has the number of calls of each function."""

    def __init__(self, capability: tuple[int, int] = (8, 6), devices: int = 1, memory: int = 1 << 30) -> None:
        self.capability, self.devices, self.free = capability, devices, memory
        self.counts: dict[str, int] = {}
        self.device: dict[int, np.ndarray[Any, Any]] = {}
        self.host: dict[int, Any] = {}
        self.streams: dict[int, list[Work]] = {}
        self.capturing: dict[int, list[Work]] = {}
        self.graphs: dict[int, list[Work]] = {}
        self.ready: dict[int, list[Work]] = {}
        self.spoiled = False
        self._handles = iter(range(256, 1 << 40, 256))
        self._current = threading.local()
        for name, arguments in HEADER.items():
            setattr(self, name, ctypes.CFUNCTYPE(c_int, *arguments)(functools.partial(self._call, name)))

    @property
    def in_use(self) -> int:
        return len(self.device) + len(self.host) + len(self.streams) + len(self.graphs) + len(self.ready)

    def at(self, address: int, size: int) -> np.ndarray[Any, Any]:
        """Return bytes on the GPU."""
        start = max(base for base in self.device if base <= address)
        assert address - start + size <= self.device[start].size, "beyond the allocated memory"
        return self.device[start][address - start :][:size]

    def queue(self, stream: int, work: Work) -> None:
        (self.capturing if stream in self.capturing else self.streams)[stream].append(work)

    def _call(self, name: str, *arguments: Any) -> int:
        self.counts[name] = self.counts.get(name, 0) + 1
        anywhere = name.startswith(("cuInit", "cuGetError", "cuDevice", "cuCtx"))
        if not anywhere and not getattr(self._current, "context", None):
            return INVALID_CONTEXT
        return getattr(self, "_" + name.removesuffix("_v2"))(*arguments) or 0

    def _made(self, where: dict[int, Any], what: Any, out: Any) -> None:
        out[0] = handle = next(self._handles)
        where[handle] = what

    def _cuInit(self, flags: int) -> None: ...

    def _cuGetErrorString(self, error: int, out: Any) -> None:
        out[0] = {OUT_OF_MEMORY: b"out of memory", INVALID_CONTEXT: b"invalid device context"}.get(error, b"an error")

    def _cuDeviceGetCount(self, out: Any) -> None:
        out[0] = self.devices

    def _cuDeviceGet(self, out: Any, number: int) -> None:
        out[0] = number

    def _cuDeviceGetName(self, out: int, size: int, device: int) -> None:
        ctypes.memmove(out, b"Fake GPU\0", 9)

    def _cuDeviceGetAttribute(self, out: Any, which: int, device: int) -> None:
        out[0] = self.capability[{75: 0, 76: 1}[which]]

    def _cuDevicePrimaryCtxRetain(self, out: Any, device: int) -> None:
        out[0] = 4096 + device

    def _cuCtxSetCurrent(self, context: int) -> None:
        self._current.context = context

    def _cuMemAlloc(self, out: Any, size: int) -> int | None:
        if size > self.free:
            return OUT_OF_MEMORY
        self.free -= size
        out[0] = address = next(self._handles) << 20
        self.device[address] = np.full(size, 255, np.uint8)  # NaN as floats
        return None

    def _cuMemFree(self, address: int) -> None:
        self.free += self.device.pop(address).size

    def _cuMemAllocHost(self, out: Any, size: int) -> None:
        memory = ctypes.create_string_buffer(size)
        out[0] = ctypes.addressof(memory)
        self.host[ctypes.addressof(memory)] = memory

    def _cuMemFreeHost(self, address: int) -> None:
        del self.host[address]

    def _cuMemcpyHtoDAsync(self, device: int, host: int, size: int, stream: int) -> None:
        source = np.frombuffer(self.host[host], np.uint8, size)  # KeyError: not page-locked

        def copy() -> None:
            self.at(device, size)[:] = source

        self.queue(stream, copy)

    def _cuMemcpyDtoHAsync(self, host: int, device: int, size: int, stream: int) -> None:
        target = np.frombuffer(self.host[host], np.uint8, size)

        def copy() -> None:
            target[:] = self.at(device, size)

        self.queue(stream, copy)

    def _cuMemcpy3DAsync(self, parameters: int, stream: int) -> int | None:
        words = np.frombuffer((ctypes.c_uint64 * 25).from_address(parameters), np.uint64).astype(np.int64)
        *sides, (width, height, depth) = words[:11], words[11:22], words[22:]
        for side in sides:
            assert not side[[0, 1, 2, 3, _HOST, _ARRAY, 8]].any()
            assert side[_MEMORY_TYPE] & 0xFFFFFFFF == _DEVICE
            if side[_PITCH] < width or side[_HEIGHT] < height or not width * height * depth:
                return INVALID_VALUE

        def lines(side: Any, plane: int) -> np.ndarray[Any, Any]:
            size = (height - 1) * side[_PITCH] + width
            memory = self.at(int(side[_ADDRESS] + plane * side[_HEIGHT] * side[_PITCH]), int(size))
            return np.lib.stride_tricks.as_strided(memory, (height, width), (side[_PITCH], 1))

        def copy() -> None:
            for plane in range(depth):
                source, target = (lines(side, plane) for side in sides)
                assert not np.shares_memory(source, target)
                target[:] = source

        self.queue(stream, copy)
        return None

    def _cuMemsetD8Async(self, address: int, value: int, size: int, stream: int) -> None:
        def fill() -> None:
            self.at(address, size)[:] = value

        self.queue(stream, fill)

    def _cuStreamCreate(self, out: Any, flags: int) -> None:
        assert flags == 1, "a stream must be non-blocking"
        self._made(self.streams, [], out)

    def _cuStreamDestroy(self, stream: int) -> None:
        del self.streams[stream]

    def _cuStreamSynchronize(self, stream: int) -> None:
        assert stream not in self.capturing
        while self.streams[stream]:
            self.streams[stream].pop(0)()

    def _cuStreamBeginCapture(self, stream: int, mode: int) -> None:
        self.capturing[stream], self.spoiled = [], False

    def _cuStreamEndCapture(self, stream: int, out: Any) -> int | None:
        work = self.capturing.pop(stream)
        if self.spoiled:
            return CAPTURE_INVALIDATED
        self._made(self.graphs, work, out)
        return None

    def _cuGraphInstantiateWithFlags(self, out: Any, graph: int, flags: int) -> None:
        self._made(self.ready, self.graphs[graph], out)

    def _cuGraphLaunch(self, graph: int, stream: int) -> None:
        for work in self.ready[graph]:
            self.queue(stream, work)

    def _cuGraphExecDestroy(self, graph: int) -> None:
        del self.ready[graph]

    def _cuGraphDestroy(self, graph: int) -> None:
        del self.graphs[graph]


def install_driver(monkeypatch: pytest.MonkeyPatch, driver: FakeDriver | None) -> None:
    """Replace NVIDIA's driver in this process by ``driver``, or by none."""
    real = ctypes.CDLL

    def load(name: str | None, *arguments: Any, **options: Any) -> Any:
        if name != cuda.LIBRARY:
            return real(name, *arguments, **options)
        if driver is None:
            raise OSError(f"{name}: cannot open shared object file")
        return driver

    monkeypatch.setattr(ctypes, "CDLL", load)
    # Use a separate cache, so that the real one stays unchanged.
    monkeypatch.setattr(cuda, "has_gpu", functools.cache(cuda.has_gpu.__wrapped__))
    for module in (engines, tensorrt):
        monkeypatch.setattr(module, "has_gpu", cuda.has_gpu)


def names_used(source: Path) -> set[str]:
    """Return the dotted names after ``trt.`` or ``self._trt.`` in a Python file."""

    def dotted(node: ast.AST) -> str | None:
        if isinstance(node, ast.Name):
            return node.id
        parent = dotted(node.value) if isinstance(node, ast.Attribute) else None
        return None if parent is None else f"{parent}.{node.attr}"  # type: ignore[attr-defined]

    tree = ast.parse(source.read_text(encoding="utf-8"))
    names = {(dotted(node) or "").removeprefix("self._") for node in ast.walk(tree)}
    return {name.removeprefix("trt.") for name in names if name.startswith("trt.")}


def like(kind: type) -> Callable[[type], type]:
    """Return a class decorator that checks public names against ``kind``, and calls against pybind's overloads."""

    def decorate(fake: type) -> type:
        for name, value in list(vars(fake).items()):
            if name.startswith("_"):
                continue
            assert hasattr(kind, name), f"{kind.__name__} has no {name}"
            if callable(value):
                setattr(fake, name, _checked(f"{kind.__name__}.{name}", getattr(kind, name).__doc__, value))
        return fake

    return decorate


# ONNX Runtime's names of types -> numpy's and TensorRT's.
_NUMPY: Mapping[str, Any] = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int32)": np.int32, "tensor(int64)": np.int64}  # fmt: skip
_TENSORRT = {"tensor(float)": "FLOAT", "tensor(float16)": "HALF", "tensor(int32)": "INT32", "tensor(int64)": "INT64"}
_TYPES = {"str": str, "typing.SupportsInt": int, "tuple": tuple, "list": list, "bool": bool, "typing_extensions.Buffer": bytes}  # fmt: skip


def overloads(name: str, signatures: str) -> list[list[tuple[str, bool]]]:
    """Parse a pybind docstring to (type, optional) of each argument after self, for each overload."""
    found = []
    for text in re.findall(rf"{name}\(self: [\w.:]+,? ?(.*?)\) -> ", signatures):
        parts = re.findall(r"\w+: ([\w.:]+)(?:\[[^]]*\])?( = [^,]+(?:, .*?>)?)?", text)
        found.append([(kind, bool(default)) for kind, default in parts])
    return found


def _checked(name: str, signatures: str, function: Callable[..., Any]) -> Callable[..., Any]:
    accepted = overloads(name.split(".")[1], signatures)
    assert accepted, f"{name}: no signature in {signatures!r}"

    @functools.wraps(function)
    def call(self: Any, *arguments: Any) -> Any:
        assert any(_fits(arguments, wanted) for wanted in accepted), f"{name}{arguments} fits none of {accepted}"
        return function(self, *arguments)

    return call


def _fits(arguments: Sequence[Any], wanted: Sequence[tuple[str, bool]]) -> bool:
    if not sum(not optional for _, optional in wanted) <= len(arguments) <= len(wanted):
        return False
    for argument, (kind, _) in zip(arguments, wanted):
        if kind in _TYPES:
            if not isinstance(argument, _TYPES[kind]):
                return False
        elif type(argument).__name__.removeprefix("Fake") != kind.rpartition(".")[2]:
            return False
    return True


def fake_bindings(driver: FakeDriver, module: str, version: str, *, capturable: bool = True) -> types.SimpleNamespace:
    """Return a fake module: ``tensorrt`` 10.3 (without CUDA graphs of its own), or ``tensorrt_rtx``."""
    rtx = module == "tensorrt_rtx"

    @like(real.IExecutionContext)
    class FakeIExecutionContext:
        def __init__(self, engine: Any) -> None:
            self._engine, self._profile, self._shapes, self._settled = engine, None, {}, None
            self._memory, self._addresses, self._captured = None, {}, False

        def set_device_memory(self, memory: int, size: int) -> None:
            assert size >= self._engine.device_memory_size_v2
            driver.at(memory, size)
            self._memory = memory

        def set_optimization_profile_async(self, number: int, stream: int) -> bool:
            self._profile = number
            return True

        def set_tensor_address(self, name: str, address: int) -> bool:
            assert not self._captured, "a captured context must stay as it is"
            self._addresses[name] = address
            return name in self._engine._names

        def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
            assert not self._captured, "a captured context must stay as it is"
            least, _, most = self._engine.get_tensor_profile_shape(name, self._profile)
            self._shapes = {**self._shapes, name: shape}
            return len(shape) == len(least) and all(low <= n <= high for low, n, high in zip(least, shape, most))

        def get_tensor_shape(self, name: str) -> tuple[int, ...]:
            axes = {}
            for given, shape in self._shapes.items():
                axes.update(zip(self._engine._tensors[given].shape, shape))
            return tuple(n if isinstance(n, int) else axes[n] for n in self._engine._tensors[name].shape)

        def execute_async_v3(self, stream: int) -> bool:
            engine, shapes, addresses = self._engine, self._shapes, dict(self._addresses)
            if self._memory is None or set(self._addresses) != set(engine._names):
                engine._log.log(real.ILogger.ERROR, "an address is missing")
                return False
            assert set(shapes) == set(engine._inputs)
            assert all(address % 256 == 0 for address in addresses.values())
            if stream in driver.capturing:
                if rtx or not capturable or self._settled != shapes:
                    driver.spoiled = True
                    engine._log.log(real.ILogger.ERROR, "operation not permitted when stream is capturing")
                    return False
                self._captured = True
            self._settled = shapes

            def compute() -> None:
                feed = {}
                for name, shape in shapes.items():
                    kind = _NUMPY[engine._tensors[name].type]
                    memory = driver.at(addresses[name], int(np.prod(shape)) * np.dtype(kind).itemsize)
                    feed[name] = memory.view(kind).reshape(shape)
                for name, array in zip(engine._outputs, engine._session.run(None, feed)):
                    target = driver.at(addresses[name], array.nbytes)
                    assert not any(np.shares_memory(target, given) for given in feed.values()), (
                        f"{name} is an input too"
                    )
                    target[:] = np.frombuffer(array.tobytes(), np.uint8)

            driver.queue(stream, compute)
            return True

    @like(real.IRuntimeConfig)
    class FakeIRuntimeConfig:
        cuda_graph_strategy = None

        def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
            assert strategy == real.ExecutionContextAllocationStrategy.USER_MANAGED

    @like(real.ICudaEngine)
    class FakeICudaEngine:
        device_memory_size_v2 = 1 << 16

        def __init__(self, plan: bytes, log: Any) -> None:
            head, _, graph = plan.partition(b"\0")
            self._profiles, self._log = json.loads(head), log
            self._session = ort.InferenceSession(graph, providers=["CPUExecutionProvider"])
            self._inputs = [tensor.name for tensor in self._session.get_inputs()]
            self._outputs = [tensor.name for tensor in self._session.get_outputs()]
            self._tensors = {t.name: t for t in (*self._session.get_outputs(), *self._session.get_inputs())}
            self._names = list(self._tensors)

        @property
        def num_io_tensors(self) -> int:
            return len(self._names)

        @property
        def num_optimization_profiles(self) -> int:
            return len(self._profiles)

        def get_tensor_name(self, index: int) -> str:
            return self._names[index]

        def get_tensor_mode(self, name: str) -> Any:
            return real.TensorIOMode.INPUT if name in self._inputs else real.TensorIOMode.OUTPUT

        def get_tensor_dtype(self, name: str) -> Any:
            return getattr(real.DataType, _TENSORRT[self._tensors[name].type])

        def get_tensor_shape(self, name: str) -> tuple[int, ...]:
            return tuple(n if isinstance(n, int) else -1 for n in self._tensors[name].shape)

        def get_tensor_profile_shape(self, name: str, profile: int) -> list[tuple[int, ...]]:
            return [tuple(shape) for shape in self._profiles[profile][name]]

        def create_runtime_config(self) -> FakeIRuntimeConfig:
            assert rtx, "TensorRT 10.3 has none"
            return FakeIRuntimeConfig()

        def create_execution_context(self, how: Any) -> FakeIExecutionContext:
            if rtx:
                assert how.cuda_graph_strategy == real.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
            else:
                assert how == real.ExecutionContextAllocationStrategy.USER_MANAGED
            return FakeIExecutionContext(self)

    @like(real.Runtime)
    class FakeRuntime:
        def __init__(self, logger: Any) -> None:
            assert isinstance(logger, real.ILogger)
            self._log = logger

        def deserialize_cuda_engine(self, plan: bytes) -> Any:
            if not plan.startswith(b"[{"):
                self._log.log(real.ILogger.ERROR, "Serialization assertion header.magicTag failed")
                return None
            return FakeICudaEngine(plan, self._log)

    shared = ("ILogger", "TensorIOMode", "ExecutionContextAllocationStrategy", "nptype")
    names = {name: getattr(real, name) for name in (*shared, *(["CudaGraphStrategy"] if rtx else []))}
    return types.SimpleNamespace(__version__=version, Runtime=FakeRuntime, **names)


def install_bindings(monkeypatch: pytest.MonkeyPatch, module: str, bindings: Any) -> None:
    bindings.__spec__ = importlib.machinery.ModuleSpec(module, None)
    monkeypatch.setitem(sys.modules, module, bindings)


def write_engine(
    engine: Path, graph: Path, profiles: Sequence[Any], builder: str, version: str, target: str,
    inputs: Inputs = CLASSIFIER_INPUTS, precision: str = "fp32",
) -> EngineRecord:  # fmt: skip
    """Write an engine for the fake GPU, with its record, from an ONNX graph and ``Profile``s."""
    shapes = [{name: profile.shapes(axes) for name, axes in inputs.items()} for profile in profiles]
    engine.write_bytes(json.dumps(shapes).encode() + b"\0" + onnx.load(graph).SerializeToString())
    record = EngineRecord(
        file=engine.name, graph=graph.name, graph_digest="", precision=precision, builder=builder, version=version,
        target=target, profiles=tuple(map(str, profiles)), workspace_bytes=1, seconds=0.0,
        size_bytes=engine.stat().st_size, sha256=hashlib.sha256(engine.read_bytes()).hexdigest(),
        command="deploykit export runs/a --out exports/a --trt --precision fp32", int8_gemms=0,
    )  # fmt: skip
    record.save(engine)
    return record
