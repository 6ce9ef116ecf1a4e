"""Helpers for tests of a running server: plain requests, and its processes."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from deploykit.triton.server import TritonServer


def start(repository: Path, **options: Any) -> TritonServer:
    return TritonServer(repository, **{"http_port": 0, "grpc_port": 0, "metrics_port": 0, **options})


def body(texts: list[str], **extra: Any) -> dict[str, Any]:
    return {"inputs": [{"name": "TEXT", "datatype": "BYTES", "shape": [len(texts), 1], "data": texts}], **extra}


def post(
    server: TritonServer, content: Any, model: str = "tiny", how: str = "infer", timeout: float = 60.0
) -> tuple[int, Any]:
    """Send a plain HTTP request. Returns status and JSON."""
    connection = http.client.HTTPConnection(server.urls.http.removeprefix("http://"), timeout=timeout)
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    try:
        connection.request("POST", f"/v2/models/{model}/{how}", data)
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    finally:
        connection.close()


def outputs(answer: Any) -> dict[str, Any]:
    return {output["name"]: output["data"] for output in answer["outputs"]}


@contextmanager
def supervised(server: TritonServer) -> Iterator[list[int]]:
    """Supervise ``server``. Yields the process ids after each restart. The end of it may end a restarted Triton."""
    stop = threading.Event()
    pids: list[int] = []
    supervision = threading.Thread(target=server.supervise, args=(stop, 0.1, lambda: pids.append(server.pid)))
    supervision.start()
    try:
        yield pids
    finally:
        stop.set()
        supervision.join()


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.05)
    return condition()


def family(server: TritonServer) -> list[psutil.Process]:
    process = psutil.Process(server.pid)
    return [process, *process.children(recursive=True)]


def gone(process: psutil.Process) -> bool:
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
