"""Check the machine before Triton is launched. Each failing check names the remedy.

Without these checks a missing library makes the server hang, and numpy 2 makes it read wrong memory.
"""

from __future__ import annotations

import errno
import importlib.metadata
import importlib.util
import os
import re
import socket
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from deploykit.errors import MissingDependencyError, ServerError, UsageError
from deploykit.runtime.serving_settings import API_KEY_VARIABLE

SERVE_EXTRA = "pip install 'deploykit[serve]'"
CONTAINER = "serve the repository with NVIDIA's Triton container, 26.06 or newer"


@dataclass(frozen=True)
class EmbeddedTriton:
    """The parts of the Triton in the nvidia-pytriton wheel. ``library_path`` is for LD_LIBRARY_PATH."""

    binary: Path
    python_backend: Path
    stub: Path
    caches: Path
    library_path: str

    @property
    def environment(self) -> dict[str, str]:
        """Return the environment for Triton's process: this one's, without keys, and without variables that would mislead
        Triton's Python."""
        left_out = ("PYTHONHOME", "PYTHONPATH", API_KEY_VARIABLE)
        environment = {key: value for key, value in os.environ.items() if key not in left_out}
        environment["LD_LIBRARY_PATH"] = self.library_path
        # The stub gets its prefix, and so its packages, from the first python3 on PATH.
        environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', os.defpath)}"
        return environment


def find_triton() -> EmbeddedTriton:
    """Locate the embedded Triton and check that it can run here.

    Raises MissingDependencyError naming what is missing and the command that installs it.
    """
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    spec = importlib.util.find_spec("pytriton")
    if spec is None or spec.origin is None:
        raise MissingDependencyError(
            "the embedded Triton server (nvidia-pytriton) is not installed", f"{SERVE_EXTRA}, or {CONTAINER}"
        )
    if importlib.util.find_spec("psutil") is None:
        raise MissingDependencyError("psutil, which watches the server, is not installed", SERVE_EXTRA)
    numpy = importlib.metadata.version("numpy")
    if int(numpy.split(".")[0]) >= 2:
        raise MissingDependencyError(
            f"the embedded Triton needs numpy 1; with numpy {numpy} it misreads text inputs",
            f"pip install 'numpy<2', or {CONTAINER}",
        )
    package = Path(spec.origin).parent
    triton = package / "tritonserver"
    stubs = triton / "python_backend_stubs"
    stub = stubs / python / "triton_python_backend_stub"
    if not stub.is_file():
        present = ", ".join(sorted((p.name for p in stubs.glob("3.*")), key=lambda v: int(v[2:]))) or "none"
        raise MissingDependencyError(
            f"the embedded Triton has no stub for Python {python} (it has: {present})",
            f"use Python 3.10 to 3.12, or {CONTAINER}",
        )
    folders = [str(package.parent / "nvidia_pytriton.libs"), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
    libpython = f"libpython{python}.so.1.0"
    own = Path(sysconfig.get_config_var("LIBDIR") or "", libpython)
    linked = linked_libraries(stub, folders)
    # The system may have the same version with another patch number, which cannot load this Python's extension modules.
    if own.is_file() and own.resolve() != linked.get(libpython):
        folders.insert(1, str(own.parent))
        linked = linked_libraries(stub, folders)
    servers = linked_libraries(triton / "bin" / "tritonserver", folders)
    missing = sorted({name for found in (linked, servers) for name, path in found.items() if path is None})
    if libpython in missing:
        raise MissingDependencyError(
            f"{libpython}, which the server's Python processes need, is not installed",
            f"apt-get install libpython{python}",
        )
    if missing:
        raise MissingDependencyError(
            f"the embedded Triton needs shared libraries that are not installed: {', '.join(missing)}",
            f"install the system packages that contain them, or {CONTAINER}",
        )
    return EmbeddedTriton(
        triton / "bin" / "tritonserver", triton / "backends" / "python", stub, triton / "caches", ":".join(folders)
    )


def linked_libraries(binary: Path, folders: Sequence[str]) -> dict[str, Path | None]:
    """Return the files that the dynamic linker takes for the shared libraries of ``binary``, with LD_LIBRARY_PATH ``folders``;
    None for a library that it does not find."""
    # What ldd does, without its shell and four more processes.
    environment = {**os.environ, "LD_LIBRARY_PATH": ":".join(folders), "LC_ALL": "C", "LD_TRACE_LOADED_OBJECTS": "1"}
    try:
        answer = subprocess.run([str(binary)], env=environment, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return {}  # the start's timeout reports the failure
    found = re.findall(r"^\s*(\S+) => (not found|/.*(?= \())", answer.stdout, re.MULTILINE)
    return {name: None if path == "not found" else Path(path).resolve() for name, path in found}


def resolve(host: str) -> str:
    """Return the IPv4 address of ``host``: Triton does not accept names. Raises UsageError if there is none."""
    try:
        return str(socket.getaddrinfo(host, None, socket.AF_INET, socket.SOCK_STREAM)[0][4][0])
    except (OSError, UnicodeError):
        raise UsageError(
            f"{host!r} is not an IPv4 address or host name", "choose another --host, such as 127.0.0.1"
        ) from None


def take_ports(address: str, wanted: Sequence[tuple[str, int]]) -> list[int]:
    """Return a port number for each protocol; 0 becomes a free one.

    Raises ServerError naming a port in use and, if visible, the process that uses it.
    """
    sockets: list[socket.socket] = []
    try:
        for protocol, port in wanted:  # all stay open until the end, so that two zeros give different ports
            sockets.append(listen(protocol, address, port))
        return [listener.getsockname()[1] for listener in sockets]
    finally:
        for listener in sockets:
            listener.close()


def listen(protocol: str, address: str, port: int) -> socket.socket:
    """Return a listening socket for ``protocol``; port 0 takes a free one. Raises ServerError as ``take_ports`` does."""
    # asyncio sets TCP_NODELAY only on sockets that name their protocol; without it each answer takes 40 ms more.
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((address, port))
        listener.listen()
    except (OSError, OverflowError) as error:
        listener.close()
        raise _cannot_listen(protocol, address, port, error) from None
    return listener


def _cannot_listen(protocol: str, address: str, port: int, error: Exception) -> ServerError:
    where = f"{protocol} port {port} on {address}"
    option = f"--{protocol}-port"
    if isinstance(error, OverflowError):
        return ServerError(f"{where}: no such port", f"choose another with {option}, 0 to 65535; 0 takes a free one")
    if isinstance(error, OSError) and error.errno == errno.EADDRNOTAVAIL:
        return ServerError(f"{address}: is not an address of this machine", "choose another --host, such as 127.0.0.1")
    if isinstance(error, PermissionError):
        return ServerError(f"{where}: permission denied", f"choose another with {option}, 1024 or more")
    owner = _listening_process(port)
    return ServerError(
        f"{where} is in use{f' by {owner}' if owner else ''}",
        f"stop that process, or choose another with {option} (0 takes a free one)",
    )


def _listening_process(port: int) -> str:
    import psutil

    try:
        for connection in psutil.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port and connection.pid:
                return f"{psutil.Process(connection.pid).name()} (process {connection.pid})"
    except psutil.Error:
        pass
    return ""
