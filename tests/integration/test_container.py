"""The command of the container's Dockerfile, run here with the embedded Triton in place of NVIDIA's: it has the guard."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from served import body, wait_until

from deploykit.triton import container
from deploykit.triton.backends import assemble_backends
from deploykit.triton.guard import LIBRARY
from deploykit.triton.preflight import find_triton, take_ports
from deploykit.triton.repository import package

DOCKERFILE = (Path(container.__file__).parent / "Dockerfile").read_text(encoding="utf-8")
HUGE = {"inputs": [{"name": "TEXT", "datatype": "INT64", "shape": [1_000_000_000, 1], "data": [1]}]}


def command() -> list[str]:
    [found] = re.findall(r"^CMD (\[.*\])$", DOCKERFILE.replace("\\\n", ""), re.MULTILINE)
    return list(json.loads(found))


@contextlib.contextmanager
def running(folder: Path, guard: Path) -> Iterator[tuple[int, str, subprocess.Popen[str]]]:
    """Run the container's command. Yields the pid of Triton, its URL and the process."""
    triton = find_triton()
    http, grpc, metrics = take_ports("127.0.0.1", [("http", 0), ("grpc", 0), ("metrics", 0)])
    assemble_backends(folder / "backends", triton.python_backend, triton.stub)
    shim = folder / "bin" / "tritonserver"
    shim.parent.mkdir()
    shim.write_text(
        f"#!/bin/sh\nexec {triton.binary} --backend-directory={folder}/backends --http-port={http} --grpc-port={grpc} "
        f'--metrics-port={metrics} --http-address=127.0.0.1 --grpc-address=127.0.0.1 "$@"\n'
    )
    shim.chmod(0o755)
    environment = {**triton.environment, "MODEL_REPOSITORY": str(folder / "repository"), "GUARD": str(guard)}
    environment["PATH"] = f"{shim.parent}{os.pathsep}{environment['PATH']}"
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command(), env=environment, stdout=log, stderr=log, text=True)
    try:
        url = f"http://127.0.0.1:{http}"
        assert wait_until(lambda: process.poll() is not None or _ready(url), 90)
        assert process.poll() is None, (folder / "log").read_text()[-3000:]
        yield process.pid, url, process
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def _ready(url: str) -> bool:
    try:
        return bool(urllib.request.urlopen(f"{url}/v2/health/ready", timeout=5).status == 200)
    except OSError:
        return False


def _ask(url: str, content: Any) -> int:
    request = urllib.request.Request(f"{url}/v2/models/tiny/infer", json.dumps(content).encode())
    try:
        return int(urllib.request.urlopen(request, timeout=60).status)
    except urllib.error.HTTPError as error:
        return error.code


@pytest.fixture
def folder(tiny_export: Path, tmp_path: Path) -> Path:
    package(tiny_export, "tiny", tmp_path / "repository", engine="onnxruntime", precision="fp32")
    return tmp_path


def test_the_containers_triton_has_the_guard(folder: Path) -> None:
    with running(folder, LIBRARY) as (pid, url, process):
        assert str(LIBRARY) in Path(f"/proc/{pid}/maps").read_text()
        Path(f"/proc/{pid}/clear_refs").write_text("5")
        assert _ask(url, HUGE) == 400
        peak = int(re.findall(r"VmHWM:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[0]) >> 10
        assert peak < 1000, "7.7 GB without the guard"
        assert _ask(url, body(["w1"])) == 200
        assert process.poll() is None
    assert "the guard against hostile requests is not there" not in (folder / "log").read_text()


def test_the_container_without_the_guard_says_so(folder: Path) -> None:
    with running(folder, folder / "none.so") as (_, url, _process):
        assert _ask(url, body(["w1"])) == 200
    assert "warning: the guard against hostile requests is not there" in (folder / "log").read_text()


def test_the_guard_is_where_the_dockerfile_copies_it() -> None:
    [named] = re.findall(r"^ENV GUARD=/opt/deploykit/(\S+)$", DOCKERFILE, re.MULTILINE)
    assert LIBRARY.as_posix().endswith(named)
