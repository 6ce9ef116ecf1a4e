"""A clock that jumps by days, forward and back, changes nothing for a server under load."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import pytest
from served import wait_until

from deploykit.triton.repository import package

pytestmark = pytest.mark.skipif(
    platform.machine() != "x86_64" or sys.platform != "linux",
    reason="the library that moves the clock is for Linux on x86-64",
)
DAY = 24 * 3600
RECOVERY_S = 5.0


@dataclass
class Running:
    process: subprocess.Popen[bytes]
    clock: Path
    keys: Path
    record: dict[str, str]
    client: httpx.Client

    def jump(self, days: int) -> None:
        with self.clock.open("r+b") as file:
            file.write(struct.pack("<q", days * DAY))

    def ask(self, key: str = "first") -> int:
        return self.client.post(
            f"{self.record['openai']}/classify", json={"model": "tiny", "input": "w1 w2"}, timeout=30,
            headers={"Authorization": f"Bearer {key}"},
        ).status_code  # fmt: skip


def line_of(key: str) -> str:
    return f"{key}:{hashlib.sha256(key.encode()).hexdigest()}\n"


@pytest.fixture(scope="module")
def running(tiny_export: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("clock")
    package(tiny_export, "tiny", folder / "repository", engine="onnxruntime", precision="fp32")
    ready, clock, keys = folder / "ready.json", folder / "clock", folder / "keys"
    clock.write_bytes(bytes(8))
    keys.write_text(line_of("first"))
    ports = [word for name in ("http", "grpc", "metrics", "openai") for word in (f"--{name}-port", "0")]
    command = [sys.executable, "-m", "deploykit", "serve", "--model-repository", folder / "repository", *ports,
               "--ready-file", ready, "--api-key-file", keys]  # fmt: skip
    library = folder / "moved_clock.so"
    source = Path(__file__).parents[1] / "support/moved_clock.c"
    compiler = [sys.executable, "-m", "ziglang", "cc", "-O1", "-shared", "-fPIC", "-target", "x86_64-linux-gnu.2.17"]
    subprocess.run([*compiler, source, "-o", library, "-ldl"], check=True)
    moved = {"LD_PRELOAD": str(library), "MOVED_CLOCK": str(clock)}
    with subprocess.Popen(command, env={**os.environ, **moved}, stderr=subprocess.PIPE) as process:
        try:
            assert wait_until(ready.exists, 90)
            with httpx.Client() as client:
                yield Running(process, clock, keys, json.loads(ready.read_text()), client)
        finally:
            process.send_signal(signal.SIGTERM)
            begun = time.monotonic()
            _, errors = process.communicate(timeout=60)
        assert process.returncode == 0
        assert time.monotonic() - begun < 20
        assert b"Traceback" not in errors, errors.decode()


def test_every_request_is_answered_while_the_clock_jumps(running: Running) -> None:
    found: list[tuple[int, float]] = []
    stop = threading.Event()

    def ask() -> None:
        while not stop.is_set():
            begun = time.monotonic()
            found.append((running.ask(), time.monotonic() - begun))

    clients = [threading.Thread(target=ask) for _ in range(4)]
    for client in clients:
        client.start()
    for days in (3, -30, 400, 0):
        time.sleep(1.0)
        running.jump(days)
    time.sleep(1.0)
    stop.set()
    for client in clients:
        client.join()
    assert len(found) > 20
    assert {status for status, _ in found} == {200}
    assert max(seconds for _, seconds in found) < RECOVERY_S
    triton = json.loads((running.clock.parent / "ready.json").read_text())["pid"]
    assert triton == running.record["pid"], "Triton was not restarted"


@pytest.mark.parametrize("days", [3, -30])
def test_a_model_that_dies_after_a_jump_answers_again_and_keys_are_read_again(running: Running, days: int) -> None:
    running.jump(days)
    children = psutil.Process(int(running.record["pid"])).children()
    [stub, *_] = [each for each in children if each.status() != psutil.STATUS_ZOMBIE and "stub" in each.name()]
    stub.kill()
    begun = time.monotonic()
    assert wait_until(lambda: running.ask() == 200, 30)
    assert time.monotonic() - begun < RECOVERY_S
    key = f"key{days}"
    assert running.ask(key) == 401
    running.keys.write_text(running.keys.read_text() + line_of(key))
    assert running.ask(key) == 200
