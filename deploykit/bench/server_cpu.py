"""Measure the CPU time that a server on this machine takes for a request, by process and by stage."""

from __future__ import annotations

import http.client
import re
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from deploykit.peak_memory import require_psutil

_STUB = "triton_python_backend_stub"
_STAGE = re.compile(r"^deploykit_stage_cpu_seconds_total\{([^}]*)\} (\S+)$", re.MULTILINE)
_STAGES = {"tokenize": "tokenizer", "encode": "engine"}
"""Stage in the metrics -> its name in the record."""


class ServerCpu:
    """The CPU time that ``processes`` of a server take while the block runs.

    - ``triton``: of all processes that run no model.
    - ``model``: of the processes that run ``model``; of them ``tokenizer`` and ``engine``, where the model reports them.
    """

    def __init__(self, processes: Sequence[Any], model: str) -> None:
        self._groups: dict[str, list[Any]] = {"triton": [], "model": []}
        self._model = model
        self._metrics = ("127.0.0.1", 0)
        for process in processes:
            command = _command(process)
            if not command or not command[0].endswith(_STUB):
                self._groups["triton"].append(process)
                self._metrics = _metrics_address(command) or self._metrics
            elif Path(command[1]).parent.parent.name == model:
                self._groups["model"].append(process)
        self._seconds: dict[str, float] = {}

    def per_request_ms(self, requests: int) -> dict[str, float] | None:
        """Return the milliseconds of a request by name; None where the server is elsewhere or a process has ended."""
        if not self._seconds or not requests:
            return None
        return {name: 1e3 * seconds / requests for name, seconds in self._seconds.items()}

    def __enter__(self) -> ServerCpu:
        self._before = self._read()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        after = self._read()
        if after.keys() == self._before.keys():
            self._seconds = {name: after[name] - self._before[name] for name in after}

    def _read(self) -> dict[str, float]:
        found = {}
        for name, processes in self._groups.items():
            if processes:
                times = [_cpu_seconds(process) for process in processes]
                if None in times:
                    return {}
                found[name] = sum(filter(None, times))
        for labels, value in _STAGE.findall(self._metrics_text()) if found else ():
            of = dict(re.findall(r'(\w+)="([^"]*)"', labels))
            if of.get("model") == self._model and of.get("stage") in _STAGES:
                found[_STAGES[of["stage"]]] = float(value)
        return found

    def _metrics_text(self) -> str:
        host, port = self._metrics
        if not port:
            return ""
        connection = http.client.HTTPConnection(host, port, timeout=5.0)
        try:
            connection.request("GET", "/metrics")
            return connection.getresponse().read().decode(errors="replace")
        except (OSError, http.client.HTTPException):
            return ""
        finally:
            connection.close()


def _command(process: Any) -> list[str]:
    try:
        return list(process.cmdline())
    except require_psutil().Error:
        return []


def _metrics_address(command: Sequence[str]) -> tuple[str, int] | None:
    given = dict(word[2:].split("=", 1) for word in command if word.startswith("--") and "=" in word)
    if not (port := given.get("metrics-port", "")).isdigit():
        return None
    host = given.get("metrics-address", "127.0.0.1")
    return "127.0.0.1" if host == "0.0.0.0" else host, int(port)


def _cpu_seconds(process: Any) -> float | None:
    try:
        times = process.cpu_times()
    except require_psutil().Error:
        return None
    return float(times.user + times.system)
