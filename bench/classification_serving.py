"""Compare three servers of the same classifier: deploykit's, a plain Triton Python model, and a FastAPI handler."""

from __future__ import annotations

import contextlib
import http.client
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from classification_contenders import Subject

from deploykit.bench.run import Candidate, run_bench
from deploykit.bench.scenarios import ClosedLoop, Scenario, Server, Within
from deploykit.triton.backends import assemble_backends
from deploykit.triton.preflight import find_triton, take_ports
from deploykit.triton.repository import package
from deploykit.triton.server import TritonServer

HANDLERS = Path(__file__).with_name("handlers")
MODEL = "model"
LIMIT_MS = 50.0
_READY_S = 120.0
_CONFIG = """\
backend: "python"
max_batch_size: 64
input { name: "TEXT" data_type: TYPE_STRING dims: [ 1 ] }
output { name: "LABEL" data_type: TYPE_STRING dims: [ 1 ] }
output { name: "SCORES" data_type: TYPE_FP32 dims: [ -1 ] }
dynamic_batching { }
parameters { key: "export" value { string_value: "%s" } }
parameters { key: "labels" value { string_value: '%s' } }
parameters { key: "max_length" value { string_value: "%d" } }
"""


@contextlib.contextmanager
def deploykit_server(subject: Subject, folder: Path) -> Iterator[str]:
    """Package and serve ``subject``. Yields the URL."""
    repository = folder / "deploykit"
    package(subject.export, MODEL, repository)
    with TritonServer(repository, http_port=0, grpc_port=0, metrics_port=0) as server:
        yield server.urls.http


@contextlib.contextmanager
def plain_triton(subject: Subject, folder: Path) -> Iterator[str]:
    """Serve handlers/triton_model.py on the embedded Triton. Yields the URL."""
    triton = find_triton()
    version = folder / "plain" / MODEL / "1"
    version.mkdir(parents=True)
    shutil.copy(HANDLERS / "triton_model.py", version / "model.py")
    task = subject.task
    values = (subject.export.resolve(), json.dumps(task.labels), task.max_length)
    (version.parent / "config.pbtxt").write_text(_CONFIG % values, encoding="utf-8")
    backends = folder / "backends"
    assemble_backends(backends, triton.python_backend, triton.stub)
    (port,) = take_ports("127.0.0.1", [("http", 0)])
    command = [str(triton.binary), f"--model-repository={folder / 'plain'}", f"--backend-directory={backends}",
               f"--http-port={port}", "--http-address=127.0.0.1", "--allow-grpc=false", "--allow-metrics=false"]  # fmt: skip
    with _running(command, port, folder / "plain.log", triton.environment) as url:
        yield url


@contextlib.contextmanager
def fastapi_handler(subject: Subject, folder: Path) -> Iterator[str]:
    """Serve handlers/fastapi_app.py. Yields the URL."""
    (port,) = take_ports("127.0.0.1", [("http", 0)])
    command = [sys.executable, "-m", "uvicorn", "fastapi_app:app", "--app-dir", str(HANDLERS), "--port", str(port),
               "--log-level", "warning"]  # fmt: skip
    environment = {**os.environ, "CHECKPOINT": str(subject.checkpoint.resolve())}
    with _running(command, port, folder / "fastapi.log", environment) as url:
        yield url


def peers() -> dict[str, Callable[[Subject, Path], Any]]:
    """Return the other servers that can run here, by name."""
    found: dict[str, Callable[[Subject, Path], Any]] = {"plain Triton Python model": plain_triton}
    if all(importlib.util.find_spec(name) for name in ("fastapi", "uvicorn")):
        found["FastAPI and transformers"] = fastapi_handler
    return found


def measure_serving(
    subject: Subject, texts: Sequence[str], *, rounds: int, seconds: float, say: Callable[[str], None]
) -> dict[str, Any]:
    """Return a bench result of all servers: 1 caller, 32 callers, and the highest rate whose p99 is within 50 ms."""
    scenarios: list[Scenario] = [ClosedLoop(1), ClosedLoop(32), Within(LIMIT_MS)]
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as running:
        candidates = []
        for title, server in {"deploykit": deploykit_server, **peers()}.items():
            say(f"starting {title}")
            url = running.enter_context(server(subject, Path(name)))
            candidates.append(Candidate(title, Server(url, MODEL, subject.task)))
        return run_bench(candidates, texts, scenarios=scenarios, rounds=rounds, seconds=seconds, progress=say).to_json()


@contextlib.contextmanager
def _running(command: Sequence[str], port: int, log: Path, environment: Mapping[str, str]) -> Iterator[str]:
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment, cwd=log.parent)
    try:
        deadline = time.monotonic() + _READY_S
        while not _answers(port):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{command[0]} does not answer:\n{log.read_text(errors='replace')[-2000:]}")
            time.sleep(0.1)
        yield f"127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(30)


def _answers(port: int) -> bool:
    """Return whether the server on ``port`` has loaded its model (FastAPI answers 404)."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/v2/health/ready")
        return connection.getresponse().status in (200, 404)
    except OSError:
        return False
    finally:
        connection.close()
