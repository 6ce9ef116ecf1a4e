"""Launch, supervise, heal and stop the embedded Triton server.

When a model's process dies, Triton does not restart it and still reports the model as ready. The supervision here
restarts it, and Triton itself when it ends.
"""

from __future__ import annotations

import http.client
import logging
import os
import re
import secrets
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO

from deploykit.errors import ServerError
from deploykit.locks import lock, unlocked
from deploykit.runtime.engines import check_engine
from deploykit.runtime.tracing import ENDPOINT_VARIABLE, traces_url
from deploykit.tasks.protocol import TaskFacts
from deploykit.tasks.registry import added_packages
from deploykit.triton.backends import assemble_backends
from deploykit.triton.guard import LIBRARY as GUARD
from deploykit.triton.preflight import EmbeddedTriton, find_triton, resolve, take_ports
from deploykit.triton.process import ADMIN_HEADER, REFUSALS, DeadStubError, Launch, TritonProcess, alive
from deploykit.triton.repository import RepositoryModel, list_models, verify_version

log = logging.getLogger(__name__)

# Callers of these APIs can replace models, map this machine's memory, or write files on it.
_RESTRICTED = "model-repository,shared-memory,trace,logging"
_NO_GUARD = (
    "the guard against hostile requests was not built, so a small request can take much memory; reinstall deploykit"
)
_SHM = Path("/dev/shm")
_OWNER = "owner"
"""Suffix of the file in ``_SHM`` that a server has locked while its regions there are in use."""
_FOLDER = "deploykit-serve-"
"""Prefix of the name of the folder in which Triton runs. A server has it locked."""
_TEMPORARY_REMEDY = "free some of the disk, or set TMPDIR to a folder on another one"
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
    answer and ``drain`` the time for requests in flight when stopping, in seconds. With ``require_signature``, a public
    key, each model's folder must be signed with its private key. ``otlp_endpoint`` is the URL of a collector of traces.
    ``while_loading`` is called once, while the models are loaded.
    Start it in a thread that outlives
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
        require_signature: Path | None = None,
        otlp_endpoint: str | None = None,
        while_loading: Callable[[], None] = lambda: None,
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
        self._require_signature = require_signature
        self._otlp_endpoint = otlp_endpoint
        self._while_loading = while_loading
        self._ready_timeout = ready_timeout
        self.drain = drain
        self._shm_prefix = f"deploykit_{os.getpid()}_{secrets.token_hex(4)}_"
        self._owner: IO[bytes] | None = None
        self._launch: Launch | None = None
        self._triton: TritonProcess | None = None
        self._retry_at: dict[str, float] = {}
        self._ready_since = 0.0
        self._failures = 0  # ends and failed starts in a row
        self._folder: Path | None = None
        self._folder_lock: int | None = None
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
            self._start_triton(self._while_loading)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Let requests in flight finish, then end the server, its stubs, and their remains.

        End ``supervise`` first: it would reload the models that this unloads.
        """
        if self._triton is not None:
            if self._triton.exit_code is None:
                # On SIGTERM, Triton waits for idle connections for its whole exit timeout. So unload the models first:
                # an unloaded model's stub ends with its last request.
                deadline = time.monotonic() + self.drain
                if self._triton.stubs:
                    self._triton.unload(
                        self._streaming, deadline
                    )  # they send requests to the others until they are done
                    self._triton.unload(set(self.models) - self._streaming)
                self._triton.terminate(deadline)
            self._triton.kill()
            self._triton = None
        if self._output is not None:
            self._output.close()
            self._output = None
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None
        if self._folder_lock is not None:
            os.close(self._folder_lock)
            self._folder_lock = None
        _remove_regions(self._shm_prefix)
        if self._owner is not None:
            self._owner.close()
            self._owner = None

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
            if self.pid != pid and self._running().stubs:
                pid = self.pid
                restarted()

    def heal(self) -> list[str]:
        """Reload models whose process died, or stays stopped. Returns their names.

        If such a process may have had unanswered requests, restarts Triton, because nothing else closes the connections
        of the waiting clients. Raises ServerError if that fails.
        """
        triton = self._running()
        triton.kill_stopped()
        triton.kill_replaced()
        lost = sorted({model for stub, model in triton.stubs if not alive(stub)} | self._retry_at.keys())
        if owing := self._answering_later.intersection(lost):
            log.warning("model %s: its process died while requests waited for it; restarting Triton", min(owing))
            self._restart()
            return lost
        healed = []
        for model in lost:
            if time.monotonic() < self._retry_at.get(model, 0.0):
                continue
            log.warning("model %s: its process died; loading it again", model)
            triton.replace(model)
            try:
                triton.control(model, "unload", timeout=self._ready_timeout)
                triton.load(model, timeout=self._ready_timeout)
            except DeadStubError:
                log.warning("model %s: its new process died while it started; restarting Triton", model)
                self._restart()
                return lost
            except REFUSALS as error:
                log.error("model %s: could not be loaded again: %s", model, error)
                self._retry_at[model] = time.monotonic() + _RETRY_LOAD_S
                continue
            self._retry_at.pop(model, None)
            triton.stubs += [(stub, name) for stub, name in triton.find_stubs() if name == model]
            log.warning("model %s: ready again", model)
            healed.append(model)
        return healed

    def memory_mb(self) -> float:
        """Return the memory of the server and its stubs, in MiB. Shared pages count once (PSS)."""
        return self._running().memory_mb()

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
        manifest = verify_version(model, self._require_signature)
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
        try:
            temporary = Path(tempfile.gettempdir() if tempfile.gettempdir().isascii() else "/tmp")
        except FileNotFoundError:
            raise ServerError("no folder for temporary files can be written", _TEMPORARY_REMEDY) from None
        _remove_abandoned(temporary)
        self._owner = open(_SHM / f"{self._shm_prefix}{_OWNER}", "wb")  # noqa: SIM115 (open while it runs)
        lock(self._owner.fileno(), wait=False)
        new = Path(tempfile.mkdtemp(prefix="deploykit-", dir=temporary))
        self._folder_lock = os.open(new, os.O_RDONLY)
        lock(self._folder_lock, wait=False)
        self._folder = new.rename(new.with_name(new.name.replace("deploykit-", _FOLDER, 1)))  # others see it locked
        (self._folder / "repository").symlink_to(self._repository.resolve())
        guard = ""
        if GUARD.is_file():
            guard = str(shutil.copy(GUARD, self._folder / "guard.so"))  # LD_PRELOAD takes no path with spaces or colons
        else:
            self.notes.append(_NO_GUARD)
        backends = self._folder / "backends"
        try:
            assemble_backends(backends, triton.python_backend, triton.stub, added_packages())
        except shutil.Error as error:  # of several files
            raise ServerError(
                f"{backends}: cannot be written: {error.args[0][0][2].split(': ')[0]}", _TEMPORARY_REMEDY
            ) from error
        try:
            self._output = open(self._log_file or self._folder / "triton.log", "w+b")  # noqa: SIM115 (open while it runs)
        except OSError as error:
            raise ServerError(
                f"{self._log_file}: cannot be written: {error.strerror}", "choose another --log-file"
            ) from error
        admin_key = secrets.token_hex(16)
        restricted = f"{_RESTRICTED}:{ADMIN_HEADER}={admin_key}"
        options = {
            "model-repository": self._folder / "repository",
            "backend-directory": backends,
            "cache-directory": triton.caches,
            "model-control-mode": "explicit",
            "http-restricted-api": restricted,
            "grpc-restricted-protocol": restricted,
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
        environment = triton.environment
        if self._otlp_endpoint is not None:
            command += [f"--trace-config={option}" for option in (
                "mode=opentelemetry", "level=TIMESTAMPS", "rate=1", f"opentelemetry,url={traces_url(self._otlp_endpoint)}",
                "opentelemetry,resource=service.name=triton",
            )]  # fmt: skip
            environment[ENDPOINT_VARIABLE] = self._otlp_endpoint
        self._launch = Launch(
            command=command,
            environment=environment,
            guard=guard,
            folder=self._folder,
            repository=self._repository,
            output=self._output,
            address=self._address,
            ports=self._ports,
            mark=self._shm_prefix,
            admin_key=admin_key,
        )

    def _start_triton(self, while_loading: Callable[[], None] = lambda: None) -> None:
        """Start Triton, and return when every model answers."""
        assert self._launch is not None
        self._triton = TritonProcess(self._launch)
        while_loading()
        self._triton.wait_until_ready(self._ready_timeout)
        self._ready_since = time.monotonic()

    def _end(self) -> str | None:
        """Return how Triton ended, or None while it runs. It also ended if someone else told it to stop."""
        triton = self._running()
        if (code := triton.exit_code) is not None:
            return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        # A server that stops ends its models first, then waits for connections, and takes no more requests.
        try:
            lives = triton.call("GET", "/v2/health/live", timeout=1.0)[0] == 200
        except ConnectionRefusedError:
            lives = False
        except (OSError, http.client.HTTPException):  # a server under load may be late
            lives = not self._retry_at and all(alive(stub) for stub, _ in triton.stubs)
        return None if lives else "it was told to stop"

    def _pause_before_restart(self, how: str) -> float:
        """Close the ports of a server that ended, and return how long to wait before it starts again, in seconds."""
        self._kill()
        if time.monotonic() - self._ready_since > _STABLE_S:
            self._failures = 0
        pause = min(2.0**self._failures - 1.0, _MAX_PAUSE_S)
        self._failures += 1
        log.warning("Triton ended (%s); starting it again%s", how, f" in {pause:g} s" if pause else "")
        return pause

    def _restart(self) -> None:
        """End Triton, and start it again. Raises ServerError, and then it is ended."""
        self._kill()
        try:
            self._start_triton()
        except ServerError:
            self._kill()
            raise
        log.warning("all models are ready again")

    def _kill(self) -> None:
        self._running().kill()
        self._retry_at.clear()

    def _running(self) -> TritonProcess:
        """Return Triton as it was last started. Raises ServerError before ``start`` and after ``stop``."""
        if self._triton is None:
            raise ServerError("the server is not running", "start it first")
        return self._triton


def _remove_abandoned(temporary: Path) -> None:
    """Remove the shared memory, and the folders in ``temporary``, of this user's servers that were killed."""
    for path in _SHM.glob(f"deploykit_*_{_OWNER}"):
        with unlocked(path) as found:
            if found and re.fullmatch(rf"deploykit_\d+_[0-9a-f]+_{_OWNER}", path.name):
                _remove_regions(path.name.removesuffix(_OWNER))
    for path in temporary.glob(f"{_FOLDER}*"):
        with unlocked(path, os.O_DIRECTORY) as found:
            if found:
                shutil.rmtree(path, ignore_errors=True)


def _remove_regions(prefix: str) -> None:
    for region in _SHM.glob(f"{prefix}*"):
        region.unlink(missing_ok=True)
