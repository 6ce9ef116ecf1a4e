"""Call NVIDIA's driver: a GPU, device and host memory, a stream, CUDA graphs.

ctypes calls the driver's own library, which is present wherever a GPU can be used and stays compatible between
releases. Packages that wrap it (cuda-bindings, CuPy) must match the machine's CUDA release, on a Jetson JetPack's; two
dozen functions do not justify that.

Source: NVIDIA "CUDA Driver API": "Initialization", "Primary Context Management", "Memory Management", "Stream
Management", "Graph Management". cuda.h maps the plain names to the ``_v2`` ones.
"""

from __future__ import annotations

import ctypes
import functools
import weakref
from collections.abc import Callable
from ctypes import POINTER, byref, c_char_p, c_int, c_size_t, c_ubyte, c_uint, c_uint64, c_void_p
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from deploykit.errors import EngineError, MissingDependencyError

if TYPE_CHECKING:
    from numpy.typing import DTypeLike, NDArray

LIBRARY = "libcuda.so.1"
FUNCTIONS: dict[str, tuple[Any, ...]] = {
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
"""Argument types of each function used. All return a CUresult (an int, 0 for success)."""
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*
_OUT_OF_MEMORY = 2
_NON_BLOCKING = 1
_THREAD_LOCAL = 1  # other threads may call the driver while this one captures
_DEVICE = 2  # CU_MEMORYTYPE_DEVICE


class _Copy(ctypes.Structure):
    """CUDA_MEMCPY3D of cuda.h: origin, memory and pitch of each side, then the extent of the copy."""

    _fields_ = [
        *((f"{side}{name}", kind)
          for side in ("src", "dst")
          for name, kind in (
              ("XInBytes", c_size_t), ("Y", c_size_t), ("Z", c_size_t), ("LOD", c_size_t), ("MemoryType", c_int),
              ("Host", c_void_p), ("Device", c_uint64), ("Array", c_void_p), ("reserved", c_void_p),
              ("Pitch", c_size_t), ("Height", c_size_t))),
        ("WidthInBytes", c_size_t),
        ("Height", c_size_t),
        ("Depth", c_size_t),
    ]  # fmt: skip


@dataclass(frozen=True)
class Place:
    """A position in three-dimensional GPU memory.

    From ``address`` on, a line begins every ``pitch`` bytes, and a plane every ``height`` lines.
    """

    address: int
    pitch: int
    height: int


class Gpu:
    """GPU ``number``, through the primary context that all CUDA libraries of the process share.

    ``name`` is NVIDIA's, ``capability`` the compute capability, such as ``sm_86``. Raises MissingDependencyError
    without a driver or GPU.
    """

    def __init__(self, number: int = 0) -> None:
        self._library = _load()
        self._check("cuInit", 0)
        count, device = c_int(), c_int()
        self._check("cuDeviceGetCount", byref(count))
        if number >= count.value:
            raise MissingDependencyError(
                f"there is no GPU {number}: the driver sees {count.value}",
                "check nvidia-smi and CUDA_VISIBLE_DEVICES; a container needs --gpus",
            )
        self._check("cuDeviceGet", byref(device), number)
        self._device, self._context = device.value, c_void_p()
        text = ctypes.create_string_buffer(256)
        self._check("cuDeviceGetName", text, len(text), device)
        self.name = text.value.decode(errors="replace")
        self.capability = f"sm_{self._attribute(_MAJOR)}{self._attribute(_MINOR)}"

    def enter(self) -> None:
        """Make this GPU current for the calling thread, for TensorRT's calls too."""
        if not self._context:
            self._check("cuDevicePrimaryCtxRetain", byref(self._context), self._device)
        self._check("cuCtxSetCurrent", self._context)

    def _attribute(self, which: int) -> int:
        value = c_int()
        self._check("cuDeviceGetAttribute", byref(value), which, self._device)
        return value.value

    def _check(self, name: str, *arguments: Any) -> None:
        """Call the driver function ``name``. Raises EngineError if it fails."""
        result = getattr(self._library, name)(*arguments)
        if result == _OUT_OF_MEMORY:
            raise EngineError(
                "the GPU is out of memory",
                "stop other processes that use it (nvidia-smi), serve fewer --instances, or export with smaller --maxShapes",
            )
        if result:
            text = c_char_p()
            self._library.cuGetErrorString(result, byref(text))
            reason = (text.value or b"unknown error").decode(errors="replace")
            raise EngineError(f"CUDA: {name}: {reason} ({result})", "check nvidia-smi; restart the process")

    def _create(self, create: str, handle: Any, *arguments: Any, destroy: str, owner: object) -> Any:
        """Call ``create`` and return the handle it fills. ``destroy`` releases it when ``owner`` is
        garbage-collected."""
        self._check(create, byref(handle), *arguments)
        weakref.finalize(owner, self._release, destroy, handle.value)
        return handle.value

    def _release(self, destroy: str, handle: int) -> None:
        # Results are ignored: at the end of the process the driver may already be unloaded.
        self._library.cuCtxSetCurrent(self._context)
        getattr(self._library, destroy)(handle)


class DeviceMemory:
    """``size`` bytes of GPU memory at ``address``."""

    def __init__(self, gpu: Gpu, size: int) -> None:
        self.size = max(1, size)
        self.address: int = gpu._create("cuMemAlloc_v2", c_uint64(), self.size, destroy="cuMemFree_v2", owner=self)


class Buffer(DeviceMemory):
    """GPU memory and page-locked host memory of the same size, so that copies between them need no staging buffer."""

    def __init__(self, gpu: Gpu, size: int) -> None:
        super().__init__(gpu, size)
        self._gpu = gpu
        self._host: int = gpu._create("cuMemAllocHost_v2", c_void_p(), self.size, destroy="cuMemFreeHost", owner=self)

    def view(self, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """Return the host memory as an array. It is valid as long as the buffer is."""
        import numpy as np  # here: importing it takes a third of the start of `serve`, which needs none

        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        assert size <= self.size
        memory = memoryview((ctypes.c_char * size).from_address(self._host)).cast("B")
        array: NDArray[Any] = np.frombuffer(memory, np.dtype(dtype)).reshape(shape)
        return array

    def upload(self, size: int, stream: Stream) -> None:
        """Enqueue a copy of the first ``size`` bytes to the GPU."""
        self._gpu._check("cuMemcpyHtoDAsync_v2", self.address, self._host, size, stream.handle)

    def download(self, size: int, stream: Stream) -> None:
        """Enqueue a copy of the first ``size`` bytes to the host. They are there once the stream is synchronized."""
        self._gpu._check("cuMemcpyDtoHAsync_v2", self._host, self.address, size, stream.handle)


class Stream:
    """A CUDA stream. ``handle`` is the one to pass to TensorRT."""

    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu
        self.handle: int = gpu._create(
            "cuStreamCreate", c_void_p(), _NON_BLOCKING, destroy="cuStreamDestroy_v2", owner=self
        )

    def clear(self, memory: DeviceMemory) -> None:
        """Enqueue filling ``memory`` with zeros."""
        self._gpu._check("cuMemsetD8Async", memory.address, 0, memory.size, self.handle)

    def copy(self, source: Place, target: Place, width: int, height: int, depth: int) -> None:
        """Enqueue a copy on the GPU: ``width`` bytes of ``height`` lines of ``depth`` planes.

        Source and target must not overlap.
        """
        sides = {
            f"{side}{name}": value
            for side, place in (("src", source), ("dst", target))
            for name, value in (
                ("MemoryType", _DEVICE),
                ("Device", place.address),
                ("Pitch", place.pitch),
                ("Height", place.height),
            )
        }
        copy = _Copy(**sides, WidthInBytes=width, Height=height, Depth=depth)
        self._gpu._check("cuMemcpy3DAsync_v2", byref(copy), self.handle)

    def synchronize(self) -> None:
        """Wait for all enqueued work. Raises EngineError if any of it failed."""
        self._gpu._check("cuStreamSynchronize", self.handle)

    def capture(self, enqueue: Callable[[], None]) -> Graph | None:
        """Capture the work that ``enqueue`` enqueues as a CUDA graph, without running it.

        Returns None if the work cannot be captured.
        """
        self._gpu._check("cuStreamBeginCapture_v2", self.handle, _THREAD_LOCAL)
        graph = c_void_p()
        try:
            enqueue()
        except EngineError:
            self._gpu._library.cuStreamEndCapture(self.handle, byref(graph))
            return None
        if self._gpu._library.cuStreamEndCapture(self.handle, byref(graph)):
            return None
        try:
            return Graph(self._gpu, graph)
        finally:
            self._gpu._check("cuGraphDestroy", graph)


class Graph:
    """A CUDA graph, instantiated and ready to launch."""

    def __init__(self, gpu: Gpu, captured: c_void_p) -> None:
        self._gpu = gpu
        self._handle: int = gpu._create(
            "cuGraphInstantiateWithFlags", c_void_p(), captured, 0, destroy="cuGraphExecDestroy", owner=self
        )

    def launch(self, stream: Stream) -> None:
        self._gpu._check("cuGraphLaunch", self._handle, stream.handle)


@functools.cache
def has_gpu() -> bool:
    """Return whether NVIDIA's driver is installed and sees a GPU."""
    try:
        Gpu()
    except (MissingDependencyError, EngineError):
        return False
    return True


def _load() -> Any:
    try:
        library = ctypes.CDLL(LIBRARY)
        for name, arguments in FUNCTIONS.items():
            function = getattr(library, name)
            function.argtypes, function.restype = arguments, c_int
    except OSError:
        raise MissingDependencyError(
            f"NVIDIA's driver is not installed ({LIBRARY} cannot be loaded)",
            "install it so that nvidia-smi works (a container needs --gpus), or choose a CPU engine: --engine onnxruntime",
        ) from None
    except AttributeError as error:
        raise MissingDependencyError(
            f"NVIDIA's driver is too old: {error}", "install a driver for CUDA 11.4 or newer"
        ) from None
    return library
