"""Launch, supervise, heal and stop the embedded Triton server.

When a model's process dies, Triton does not restart it and still reports the model as ready. The supervision here
restarts it, and Triton itself when it ends.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import logging
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING

from deploykit.errors import ServerError
from deploykit.runtime.engines import check_engine
from deploykit.tasks.protocol import TaskFacts
from deploykit.tasks.registry import added_packages
from deploykit.triton.backends import assemble_backends
from deploykit.triton.guard import LIBRARY as GUARD
from deploykit.triton.preflight import EmbeddedTriton, find_triton, resolve, take_ports
from deploykit.triton.repository import RepositoryModel, list_models, verify_version

if TYPE_CHECKING:
    import psutil

log = logging.getLogger(__name__)

_ADMIN_HEADER = "deploykit-admin"
# Callers of these APIs can replace models, map this machine's memory, or write files on it.
_RESTRICTED = "model-repository,shared-memory,trace,logging"
# Executes the program in its arguments, which the kernel sends SIGTERM if this process is killed, with the library in the
# first argument. It is a separate program because code between fork and exec can deadlock in a process with threads.
_EXEC_BOUND = """
import ctypes, os, signal, sys
PR_SET_PDEATHSIG = 1
ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
guard, *command = sys.argv[1:]
if guard:
    os.environ["LD_PRELOAD"] = ":".join(filter(None, (guard, os.environ.get("LD_PRELOAD"))))
os.execv(command[0], command)
"""
_NO_GUARD = (
    "the guard against hostile requests was not built, so a small request can take much memory; reinstall deploykit"
)
_RETRY_LOAD_S = 5.0
_MAX_PAUSE_S = 30.0
_STABLE_S = 60.0
"""A server that ran for so long is restarted without a pause when it ends."""


@dataclass(frozen=True)
class Urls:
    """Addresses of a running server."""

    http: str
    grpc: str
    metrics: str


class TritonServer:
    """All packaged models of ``repository`` on one Triton server, from ``start`` to ``stop``.

    Use it as a context manager. A port of 0 takes a free one. ``ready_timeout`` is the time until all models must
    answer and ``drain`` the time for requests in flight when stopping, in seconds. Start it in a thread that outlives
    the server: the kernel ends the server with the thread that started it.
    """

    def __init__(
        self,
        repository: Path,
        *,
        host: str = "127.0.0.1",
        http_port: int = 8000,
        grpc_port: int = 8001,
        metrics_port: int = 8002,
        log_file: Path | None = None,
        verbose: bool = False,
        ready_timeout: float = 60.0,
        drain: float = 30.0,
    ) -> None:
        self.models: tuple[str, ...] = ()
        self.tasks: dict[str, TaskFacts] = {}
        """The facts of each model that answers by itself: not of those that stream another's answers."""
        self.notes: list[str] = []
        self.urls = Urls("", "", "")
        # Models that answer later: if their process dies, Triton does not notice that answers are lost.
        self._answering_later: set[str] = set()
        self._streaming: set[str] = set()  # models that send each sentence to another model
        self._repository = repository
        self._host = host
        self._address = ""
        self._ports = {"http": http_port, "grpc": grpc_port, "metrics": metrics_port}
        self._log_file = log_file
        self._verbose = verbose
        self._ready_timeout = ready_timeout
        self.drain = drain
        self._admin_key = secrets.token_hex(16)
        self._shm_prefix = f"deploykit_{os.getpid()}_{secrets.token_hex(4)}_"
        self._command: list[str] = []
        self._environment: dict[str, str] = {}
        self._process: subprocess.Popen[bytes] | None = None
        self._stubs: list[tuple[psutil.Process, str]] = []
        self._retry_at: dict[str, float] = {}
        self._ready_since = 0.0
        self._failures = 0  # ends and failed starts in a row
        self._folder: Path | None = None
        self._output: IO[bytes] | None = None

    def __enter__(self) -> TritonServer:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        return self._running().pid

    def start(self) -> None:
        """Check everything, launch Triton, and return when every model answers.

        Raises MissingDependencyError, ArtifactError or ServerError.
        """
        triton = find_triton()
        self.models = tuple(self._servable())
        address = resolve(self._host)
        ports = take_ports(address, list(self._ports.items()))
        self._ports = dict(zip(self._ports, ports))
        self._address = address
        self.urls = Urls(
            f"http://{address}:{ports[0]}", f"{address}:{ports[1]}", f"http://{address}:{ports[2]}/metrics"
        )
        try:
            self._prepare(triton)
            self._launch()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Let requests in flight finish, then end the server, its stubs, and their remains.

        End ``supervise`` first: it would reload the models that this unloads.
        """
        process = self._process
        if process is not None:
            stubs = [stub for stub, _ in self._stubs] + _children(process.pid)
            if process.poll() is None:
                # On SIGTERM, Triton waits for idle connections for its whole exit timeout. So unload the models first:
                # an unloaded model's stub ends with its last request.
                deadline = time.monotonic() + self.drain
                if self._stubs:
                    self._unload(
                        self._streaming, deadline
                    )  # streaming models send requests to the others until they are done
                    self._unload(set(self.models) - self._streaming)
                process.terminate()
                _wait_for_end(process, stubs, deadline)
            if process.poll() is None:
                process.kill()
                process.wait()
            self._process = None
            for stub in stubs:
                _kill(stub)
        self._stubs = []
        if self._output is not None:
            self._output.close()
            self._output = None
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None
        for region in Path("/dev/shm").glob(f"{self._shm_prefix}*"):
            region.unlink(missing_ok=True)

    def supervise(
        self, stop: threading.Event, interval: float = 0.5, restarted: Callable[[], None] = lambda: None
    ) -> None:
        """Heal models, and restart Triton when it ends, until ``stop`` is set. Calls ``restarted`` after each restart.

        While Triton is away, its ports refuse connections. The pauses between restarts grow to 30 s.
        """
        pid = self.pid
        while not stop.wait(interval):
            try:
                if (how := self._end()) is None:
                    self.heal()
                elif stop.wait(self._pause_before_restart(how)):
                    return
                else:
                    self._restart()
            except ServerError as error:
                log.error("Triton could not be started again: %s", error)
            if self.pid != pid and self._stubs:
                pid = self.pid
                restarted()

    def heal(self) -> list[str]:
        """Reload models whose process died. Returns their names.

        If such a process may have had unanswered requests, restarts Triton, because nothing else closes the connections
        of the waiting clients. Raises ServerError if that fails.
        """
        self._running()
        lost = sorted({model for stub, model in self._stubs if not _alive(stub)} | self._retry_at.keys())
        if owing := self._answering_later.intersection(lost):
            log.warning("model %s: its process died while requests waited for it; restarting Triton", min(owing))
            self._restart()
            return lost
        healed = []
        for model in lost:
            if time.monotonic() < self._retry_at.get(model, 0.0):
                continue
            log.warning("model %s: its process died; loading it again", model)
            # Those of its processes that live end with their last request: that they do is no reason to load it again.
            leaving = {stub for stub, name in self._stubs if name == model}
            self._stubs = [(stub, name) for stub, name in self._stubs if name != model]
            try:
                self._control(model, "unload")
                self._control(model, "load")
            except (ServerError, OSError, http.client.HTTPException) as error:
                log.error("model %s: could not be loaded again: %s", model, error)
                self._retry_at[model] = time.monotonic() + _RETRY_LOAD_S
                continue
            self._retry_at.pop(model, None)
            self._stubs += [(stub, name) for stub, name in self._find_stubs() if name == model and stub not in leaving]
            log.warning("model %s: ready again", model)
            healed.append(model)
        return healed

    def memory_mb(self) -> float:
        """Memory of the server and its stubs, in MiB. Shared pages count once (PSS)."""
        import psutil

        total = 0
        for process in [psutil.Process(self.pid), *(stub for stub, _ in self._stubs)]:
            with contextlib.suppress(psutil.Error):
                total += process.memory_full_info().pss
        return total / 2**20

    def _unload(self, models: set[str], until: float = 0.0) -> None:
        """Begin to unload ``models``, and wait until ``until`` for their last requests."""
        for model in models:
            with contextlib.suppress(ServerError, OSError, http.client.HTTPException):
                self._control(model, "unload", timeout=5.0)
        while time.monotonic() < until and any(_alive(stub) for stub, model in self._stubs if model in models):
            time.sleep(0.05)

    def _servable(self) -> list[str]:
        """Return the names of the models to load, after verifying their files."""
        names = []
        for model in list_models(self._repository):
            if model.problem is not None:
                raise model.problem
            if not model.versions:
                self.notes.append(f"model {model.name}: skipped, it has no version yet; run deploykit package")
                continue
            self._check(model)
            names.append(model.name)
        if not names:
            skipped = "".join(f"\n  {note}" for note in self.notes)
            raise ServerError(f"{self._repository}: no model to serve{skipped}", "run deploykit package first")
        return names

    def _check(self, model: RepositoryModel) -> None:
        manifest = verify_version(model)
        if manifest.options.get("name", model.name) != model.name:
            log.info("model %s was packaged as %s", model.name, manifest.options["name"])
        if "engine" in manifest.options:
            check_engine(str(manifest.options["engine"]))
        if manifest.task.graph_kind != "encoder":
            self._answering_later.add(model.name)
        if "streams" in manifest.options:
            self._streaming.add(model.name)
        else:
            self.tasks[model.name] = manifest.task

    def _prepare(self, triton: EmbeddedTriton) -> None:
        """Create the folder that Triton runs in, and its command line."""
        # The stub's Python has no locale, so paths given to it must be ASCII; the repository's may not be.
        temporary = tempfile.gettempdir()
        self._folder = Path(
            tempfile.mkdtemp(prefix="deploykit-triton-", dir=temporary if temporary.isascii() else "/tmp")
        )
        (self._folder / "repository").symlink_to(self._repository.resolve())
        guard = ""
        if GUARD.is_file():
            guard = str(shutil.copy(GUARD, self._folder / "guard.so"))  # LD_PRELOAD takes no path with spaces or colons
        else:
            self.notes.append(_NO_GUARD)
        backends = self._folder / "backends"
        assemble_backends(backends, triton.python_backend, triton.stub, added_packages())
        try:
            self._output = open(self._log_file or self._folder / "triton.log", "w+b")  # noqa: SIM115 (open while it runs)
        except OSError as error:
            raise ServerError(
                f"{self._log_file}: cannot be written: {error.strerror}", "choose another --log-file"
            ) from error
        options = {
            "model-repository": self._folder / "repository",
            "backend-directory": backends,
            "cache-directory": triton.caches,
            "model-control-mode": "explicit",
            "http-restricted-api": f"{_RESTRICTED}:{_ADMIN_HEADER}={self._admin_key}",
            "grpc-restricted-protocol": f"{_RESTRICTED}:{_ADMIN_HEADER}={self._admin_key}",
            "exit-timeout-secs": max(1, round(self.drain)),
            "log-verbose": int(self._verbose),
            **{f"{protocol}-port": port for protocol, port in self._ports.items()},
            **{f"{protocol}-address": self._address for protocol in self._ports},
        }
        command = [str(triton.binary), "--disable-auto-complete-config"]
        command += [f"--{name}={value}" for name, value in options.items()]
        command += [f"--load-model={model}" for model in self.models]
        command += [f"--backend-config=python,shm-region-prefix-name={self._shm_prefix}"]
        command += [f"--backend-config=python,stub-timeout-seconds={max(1, round(self._ready_timeout))}"]
        self._command = [sys.executable, "-IS", "-c", _EXEC_BOUND, guard, *command]
        self._environment = triton.environment

    def _launch(self) -> None:
        """Start Triton, and return when every model answers."""
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            env=self._environment,
            cwd=self._folder,
            start_new_session=True,  # Ctrl-C must reach only this process, which lets requests finish first
        )
        self._wait_until_ready()
        self._ready_since = time.monotonic()
        self._stubs = self._find_stubs()

    def _end(self) -> str | None:
        """Return how Triton ended, or None while it runs. It also ended if someone else told it to stop."""
        code = self._running().poll()
        if code is not None:
            return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        if all(_alive(stub) for stub, _ in self._stubs):
            return None
        # A server that stops ends its models first, then waits for connections, and takes no more requests.
        with contextlib.suppress(OSError, http.client.HTTPException):
            if self._call("GET", "/v2/health/live", timeout=1.0)[0] == 200:
                return None
        return "it was told to stop"

    def _pause_before_restart(self, how: str) -> float:
        """Close the ports of a server that ended, and return how long to wait before it starts again, in seconds."""
        self._kill_all()
        if time.monotonic() - self._ready_since > _STABLE_S:
            self._failures = 0
        pause = min(2.0**self._failures - 1.0, _MAX_PAUSE_S)
        self._failures += 1
        log.warning("Triton ended (%s); starting it again%s", how, f" in {pause:g} s" if pause else "")
        return pause

    def _restart(self) -> None:
        """End Triton, and start it again. Raises ServerError, and then it is ended."""
        self._kill_all()
        try:
            self._launch()
        except ServerError:
            self._kill_all()
            raise
        log.warning("all models are ready again")

    def _kill_all(self) -> None:
        """End Triton and its stubs at once. Stubs hold Triton's sockets: until they end, clients wait instead of seeing
        their connections close."""
        process = self._running()
        stubs = [stub for stub, _ in self._stubs] + _children(process.pid)
        process.kill()
        process.wait()
        for stub in stubs:
            _kill(stub)
        self._stubs = []
        self._retry_at.clear()

    def _wait_until_ready(self) -> None:
        process = self._running()
        deadline = time.monotonic() + self._ready_timeout
        while time.monotonic() < deadline:
            if process.poll() is not None:
                raise self._start_failure(f"Triton ended with exit code {process.returncode}")
            with contextlib.suppress(OSError, http.client.HTTPException):
                if self._call("GET", "/v2/health/ready", timeout=1.0)[0] == 200:
                    for port in self._ports.values():  # the metrics port opens last, after Triton announces it
                        socket.create_connection((self._own_address, port), timeout=1.0).close()
                    return
            time.sleep(0.05)
        raise self._start_failure(f"Triton was not ready within {self._ready_timeout:g} s")

    def _start_failure(self, what: str) -> ServerError:
        """Return the most specific error in the log: a model's own message, or else Triton's error lines."""
        lines = self._log_lines()
        for model, message in _load_failures(lines):
            message, _, remedy = message.partition("\n  remedy: ")
            return ServerError(f"model {model} cannot be loaded: {message}", remedy or None)
        # Every machine without a GPU logs errors about it.
        errors = [line for line in lines if re.match(r"E\d|error:", line) and "Cuda" not in line][-10:]
        shown = "".join(f"\n  {line}" for line in errors)
        remedy = "raise --ready-timeout, or start with --verbose --log-file triton.log and read that file"
        return ServerError(f"{what}{shown}", remedy)

    def _log_lines(self) -> list[str]:
        assert self._output is not None
        self._output.seek(0)
        log = self._output.read().decode(errors="replace")
        return log.replace(f"{self._folder}/repository/", f"{self._repository}/").splitlines()

    def _running(self) -> subprocess.Popen[bytes]:
        """Return the server's process. Raises ServerError if it is not running."""
        if self._process is None:
            raise ServerError("the server is not running", "start it first")
        return self._process

    def _find_stubs(self) -> list[tuple[psutil.Process, str]]:
        """Return the server's living stub processes, each with the model it runs."""
        import psutil

        found = []
        for stub in _children(self._running().pid):
            with contextlib.suppress(psutil.Error):
                command = stub.cmdline()
                # triton_python_backend_stub REPOSITORY/MODEL/VERSION/model.py ...
                if len(command) > 1 and command[0].endswith("triton_python_backend_stub") and _alive(stub):
                    found.append((stub, Path(command[1]).parent.parent.name))
        return found

    def _control(self, model: str, action: str, *, timeout: float | None = None) -> None:
        """Make Triton load a model, or begin to unload it."""
        status, answer = self._call(
            "POST",
            f"/v2/repository/models/{model}/{action}",
            timeout=timeout or self._ready_timeout,
            headers={_ADMIN_HEADER: self._admin_key},
        )
        if status != 200:
            with contextlib.suppress(ValueError, KeyError, TypeError):
                answer = json.loads(answer)["error"]
            raise ServerError(f"Triton refused to {action} {model}: {answer}")

    @property
    def _own_address(self) -> str:
        return "127.0.0.1" if self._address == "0.0.0.0" else self._address

    def _call(
        self, method: str, path: str, *, timeout: float, headers: dict[str, str] | None = None
    ) -> tuple[int, str]:
        connection = http.client.HTTPConnection(self._own_address, self._ports["http"], timeout=timeout)
        try:
            connection.request(method, path, headers=headers or {})
            response = connection.getresponse()
            return response.status, response.read().decode(errors="replace")
        finally:
            connection.close()


def _load_failures(lines: list[str]) -> list[tuple[str, str]]:
    """Return (model, message) for every model that failed to load according to the log."""
    failures = []
    for line in lines:
        match = re.search(r"\"failed to load '([^']+)' version \d+: (?:[A-Z][a-z ]+: )?(.*)\"$", line)
        if match:
            message = match[2].removeprefix("TritonModelException: ").replace("\\n", "\n").replace('\\"', '"')
            message = message.partition("\n\nAt:\n")[0]  # below it are Python frames
            failures.append((match[1], re.sub(r"\n\s*\n+", "\n", message).strip()))
    return failures


def _wait_for_end(process: subprocess.Popen[bytes], stubs: list[psutil.Process], deadline: float) -> None:
    """Wait until the server has ended, ``deadline`` is over, or it has nothing left to wait for.

    Triton itself would also wait for idle connections, and for every stub that died during a request, even a replaced
    one.
    """
    last_alive = time.monotonic()
    while process.poll() is None and time.monotonic() < min(deadline + 5.0, last_alive + 2.0):
        if any(_alive(stub) for stub in stubs):
            last_alive = time.monotonic()
        time.sleep(0.05)


def _children(pid: int) -> list[psutil.Process]:
    import psutil

    try:
        return list(psutil.Process(pid).children(recursive=True))
    except psutil.Error:
        return []


def _alive(process: psutil.Process) -> bool:
    import psutil

    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


def _kill(process: psutil.Process) -> None:
    import psutil

    with contextlib.suppress(psutil.Error):
        process.kill()
        process.wait(5.0)
