"""A running Triton: its processes, its HTTP port, its log, and its end."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import select
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

from deploykit.errors import ServerError

if TYPE_CHECKING:
    import psutil

ADMIN_HEADER = "deploykit-admin"
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
_STOPPED_S = 1.0
_DEAD_S = 2.0
_IDLE_S = 10.0
_IDLE_CPU_S = 0.05
"""A replaced stub that computes less in ``_IDLE_S`` has nothing left to answer."""
REFUSALS = (ServerError, OSError, http.client.HTTPException)
"""Errors of calls to a Triton that does not answer, or that refuses the call."""


class DeadStubError(ServerError):
    """Triton waits for a stub that died while it started."""


@dataclass(frozen=True)
class Launch:
    """How Triton is started and restarted: always on the same ports and with the same key."""

    command: list[str]
    environment: Mapping[str, str]
    guard: str
    """A library that is loaded into Triton before its own, or an empty string."""
    folder: Path
    """Triton's working folder. ``repository`` in it is a link to ``repository``."""
    repository: Path
    output: IO[bytes]
    address: str
    ports: Mapping[str, int]
    mark: str
    """Text that is in the command line of Triton and of each of its stubs, and in no other."""
    admin_key: str


class TritonProcess:
    """One run of Triton and of its stubs, each of which runs a model. The thread that creates it must outlive it."""

    def __init__(self, launch: Launch) -> None:
        self.stubs: list[tuple[psutil.Process, str]] = []
        """The stubs that should be alive, each with its model."""
        self._stopped_at: dict[psutil.Process, float] = {}
        self._replaced: dict[psutil.Process, tuple[float, float]] = {}  # CPU seconds that it had used at a time
        self._launch = launch
        self._popen = subprocess.Popen(
            [sys.executable, "-IS", "-c", _EXEC_BOUND, launch.guard, *launch.command],
            stdin=subprocess.DEVNULL,
            stdout=launch.output,
            stderr=subprocess.STDOUT,
            env=dict(launch.environment),
            cwd=launch.folder,
            start_new_session=True,  # Ctrl-C must reach only this process, which lets requests finish first
        )

    @property
    def pid(self) -> int:
        return self._popen.pid

    @property
    def exit_code(self) -> int | None:
        """None while it runs, and less than 0 if a signal ended it."""
        return self._popen.poll()

    def wait_until_ready(self, timeout: float) -> None:
        """Return when every model answers and all ports are open. Raises ServerError after ``timeout`` seconds."""
        deadline = time.monotonic() + timeout
        died = self._watch_for_deaths()
        while time.monotonic() < deadline:
            if self.exit_code is not None:
                raise self._start_failure(f"Triton ended with exit code {self.exit_code}")
            if died():
                raise self._start_failure("a model's process died while it started")
            with contextlib.suppress(OSError, http.client.HTTPException):
                if self.call("GET", "/v2/health/ready", timeout=1.0)[0] == 200:
                    for port in self._launch.ports.values():  # the metrics port opens last, after Triton announces it
                        socket.create_connection((self._own_address, port), timeout=1.0).close()
                    self.stubs = self.find_stubs()
                    return
            time.sleep(0.05)
        raise self._start_failure(f"Triton was not ready within {timeout:g} s")

    def find_stubs(self) -> list[tuple[psutil.Process, str]]:
        """Return the living stubs that were not replaced, each with the model that it runs."""
        import psutil

        found = []
        for stub in _children(self.pid):
            with contextlib.suppress(psutil.Error):
                command = stub.cmdline()
                # triton_python_backend_stub REPOSITORY/MODEL/VERSION/model.py ...
                is_stub = len(command) > 1 and command[0].endswith("triton_python_backend_stub")
                if is_stub and alive(stub) and stub not in self._replaced:
                    found.append((stub, Path(command[1]).parent.parent.name))
        return found

    def kill_stopped(self) -> None:
        """Kill the stubs that have been stopped (SIGSTOP) for 1 s: requests wait for them, and they may never continue."""
        import psutil

        now = time.monotonic()
        stopped = {stub for stub, _ in self.stubs if _status(stub) == psutil.STATUS_STOPPED}
        self._stopped_at = {stub: self._stopped_at.get(stub, now) for stub in stopped}
        for stub, since in self._stopped_at.items():
            if now - since >= _STOPPED_S:
                with contextlib.suppress(psutil.Error):
                    stub.kill()

    def replace(self, model: str) -> None:
        """Expect other stubs of ``model``, which is loaded again. Those that it has end with their last request."""
        now = time.monotonic()
        self._replaced |= {stub: (_cpu_seconds(stub), now) for stub, name in self.stubs if name == model}
        self.stubs = [(stub, name) for stub, name in self.stubs if name != model]

    def kill_replaced(self) -> None:
        """Kill the replaced stubs that have been idle or stopped for 10 s: Triton 2.51 did not end all of them."""
        import psutil

        now = time.monotonic()
        self._replaced = {stub: used for stub, used in self._replaced.items() if alive(stub)}
        for stub, (seconds, since) in self._replaced.items():
            if (used := _cpu_seconds(stub)) - seconds >= _IDLE_CPU_S:
                self._replaced[stub] = used, now
            elif now - since >= _IDLE_S:
                with contextlib.suppress(psutil.Error):
                    stub.kill()

    def load(self, model: str, *, timeout: float) -> None:
        """Make Triton load ``model``. Raises one of ``REFUSALS``, and ``DeadStubError`` if Triton would wait for ever."""
        died = self._watch_for_deaths()

        def check() -> None:
            if died():
                raise DeadStubError(f"a process of the model {model} died while it started")

        self.control(model, "load", timeout=timeout, check=check)

    def _watch_for_deaths(self) -> Callable[[], bool]:
        """Return a function that says whether a stub, started after this call, has been dead for 2 s without Triton noticing.

        Triton 2.51 waits for ever for the first message of a stub that died before it (python_backend, pull request 408).
        """
        import psutil

        known = set(_children(self.pid, recursive=False))
        dead_since: dict[psutil.Process, float] = {}

        def died() -> bool:
            nonlocal dead_since
            now, started = time.monotonic(), set(_children(self.pid, recursive=False)) - known
            dead = [child for child in started if _status(child) == psutil.STATUS_ZOMBIE]
            # A child whose death Triton noticed is no longer among the dead.
            dead_since = {child: dead_since.get(child, now) for child in dead}
            return any(now - since >= _DEAD_S for since in dead_since.values())

        return died

    def control(self, model: str, action: str, *, timeout: float, check: Callable[[], None] = lambda: None) -> None:
        """Make Triton load ``model``, or begin to unload it. Raises one of ``REFUSALS``, and what ``check`` raises meanwhile."""
        status, answer = self.call(
            "POST",
            f"/v2/repository/models/{model}/{action}",
            timeout=timeout,
            headers={ADMIN_HEADER: self._launch.admin_key},
            check=check,
        )
        if status != 200:
            with contextlib.suppress(ValueError, KeyError, TypeError):
                answer = json.loads(answer)["error"]
            raise ServerError(f"Triton refused to {action} {model}: {answer}")

    def unload(self, models: Iterable[str], until: float = 0.0) -> None:
        """Begin to unload ``models``, and wait until ``until`` for their last requests."""
        models = set(models)
        for model in models:
            with contextlib.suppress(*REFUSALS):
                self.control(model, "unload", timeout=5.0)
        while time.monotonic() < until and any(alive(stub) for stub, model in self.stubs if model in models):
            time.sleep(0.05)

    def terminate(self, until: float) -> None:
        """Ask Triton to end, and wait until ``until``, or until it has nothing left to wait for.

        Triton itself would also wait for idle connections, and for every stub that died during a request, even a
        replaced one. The other stubs of a replaced model may still answer, but do not end while Triton waits for that stub: of
        them, this waits only for those that compute.
        """
        stubs = [stub for stub, _ in self.stubs]
        seconds = {child: _cpu_seconds(child) for child in _children(self.pid) if child not in stubs}
        self._popen.terminate()
        last_busy = time.monotonic()
        while self.exit_code is None and time.monotonic() < min(until + 5.0, last_busy + 2.0):
            now = {child: _cpu_seconds(child) for child in seconds}
            if now != seconds or any(alive(stub) for stub in stubs):
                last_busy = time.monotonic()
            seconds = now
            time.sleep(0.05)

    def kill(self) -> None:
        """End Triton and its stubs at once, also a stub that has just been started.

        Stubs hold Triton's sockets: until they end, clients wait instead of seeing their connections close.
        """
        import psutil

        self._popen.kill()
        self._popen.wait()
        self.stubs = []
        for process in psutil.process_iter():  # Triton has ended, so it starts no more stubs
            with contextlib.suppress(psutil.Error):
                if any(self._launch.mark in word for word in process.cmdline()):
                    process.kill()
                    process.wait(5.0)

    def memory_mb(self) -> float:
        """Return the memory of Triton and its stubs, in MiB. Shared pages count once (PSS)."""
        import psutil

        total = 0
        for process in [psutil.Process(self.pid), *(stub for stub, _ in self.stubs)]:
            with contextlib.suppress(psutil.Error):
                total += process.memory_full_info().pss
        return total / 2**20

    def call(
        self,
        method: str,
        path: str,
        *,
        timeout: float,
        headers: Mapping[str, str] | None = None,
        check: Callable[[], None] = lambda: None,
    ) -> tuple[int, str]:
        """Send a request to the HTTP port. Returns status and body. Raises one of ``REFUSALS``, and what ``check`` raises
        while there is no answer.

        When Triton has ended, its stubs keep the connection open.
        """
        connection = http.client.HTTPConnection(self._own_address, self._launch.ports["http"], timeout=timeout)
        deadline = time.monotonic() + timeout
        try:
            connection.request(method, path, headers=dict(headers or {}))
            answered = select.poll()  # select takes no descriptor above 1,023
            answered.register(connection.sock, select.POLLIN)
            while not answered.poll(100):
                if self.exit_code is not None:
                    raise ConnectionResetError("Triton ended")
                if time.monotonic() >= deadline:
                    raise TimeoutError("timed out")
                check()
            response = connection.getresponse()
            return response.status, response.read().decode(errors="replace")
        finally:
            connection.close()

    @property
    def _own_address(self) -> str:
        return "127.0.0.1" if self._launch.address == "0.0.0.0" else self._launch.address

    def _start_failure(self, what: str) -> ServerError:
        """Return the most specific error in the log: a model's own message, or else Triton's error lines."""
        launch = self._launch
        launch.output.seek(0)
        text = launch.output.read().decode(errors="replace")
        lines = text.replace(f"{launch.folder}/repository/", f"{launch.repository}/").splitlines()
        for model, message in _load_failures(lines):
            message, _, remedy = message.partition("\n  remedy: ")
            return ServerError(f"model {model} cannot be loaded: {message}", remedy or None)
        # Every machine without a GPU logs errors about it.
        errors = [line for line in lines if re.match(r"E\d|error:", line) and "Cuda" not in line][-10:]
        shown = "".join(f"\n  {line}" for line in errors)
        remedy = "raise --ready-timeout, or start with --verbose --log-file triton.log and read that file"
        return ServerError(f"{what}{shown}", remedy)


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


def alive(process: psutil.Process) -> bool:
    import psutil

    return _status(process) not in (None, psutil.STATUS_ZOMBIE)


def _status(process: psutil.Process) -> str | None:
    """Return a process's status as psutil names it, or None if it has ended."""
    import psutil

    try:
        return str(process.status()) if process.is_running() else None
    except psutil.Error:
        return None


def _cpu_seconds(process: psutil.Process) -> float:
    import psutil

    try:
        times = process.cpu_times()
    except psutil.Error:
        return 0.0
    return float(times.user + times.system)


def _children(pid: int, *, recursive: bool = True) -> list[psutil.Process]:
    import psutil

    try:
        return list(psutil.Process(pid).children(recursive=recursive))
    except psutil.Error:
        return []
