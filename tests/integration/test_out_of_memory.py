"""A model process that gets no more memory fails the request that needs it, and soon answers again."""

from __future__ import annotations

import json
import resource
import time
from http.client import HTTPException
from pathlib import Path
from typing import Any

import pytest
from served import body, outputs, post, start, supervised, wait_until

from deploykit.triton.repository import package
from deploykit.triton.server import TritonServer

MANY = 8 * ["w1 w2 w3 w4 " * 20_000]
ROOM = 1 << 20
NO_MEMORY = "the model failed on this request: its process has no memory left for it"


def limit(server: TritonServer, model: str) -> None:
    """Give each process of ``model`` ``ROOM`` bytes beside what it has."""
    for process, name in server._running().find_stubs():
        if name == model:
            most = process.memory_info().vms + ROOM
            resource.prlimit(process.pid, resource.RLIMIT_AS, (most, resource.RLIM_INFINITY))


def test_a_request_without_memory_fails_alone(
    tiny_export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Large blocks go back to the system when they are freed: memory kept from an earlier request would serve the next one.
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", str(1 << 17))
    for name in ("tiny", "other"):
        package(tiny_export, name, tmp_path, engine="onnxruntime", precision="fp32")
    with start(tmp_path) as server, supervised(server):
        expected = outputs(post(server, body(["w1"]))[1])

        def ask(texts: list[str], model: str = "tiny") -> tuple[int, Any]:
            """Return status and answer; 503 where Triton itself ended."""
            try:
                return post(server, body(texts), model)
            except (OSError, HTTPException) as error:
                return 503, {"error": str(error)}

        def answer_again() -> bool:
            found = [ask(["w1"], model) for model in ("tiny", "other")]
            return all(status == 200 and outputs(answer) == expected for status, answer in found)

        for _ in range(4):  # so that the processes have the memory that they share with Triton for such a request
            assert ask(MANY)[0] == 200
        for _ in range(3):
            limit(server, "tiny")
            status, answer = ask(MANY)
            failed = time.monotonic()
            # A library that cannot go on without memory ends the process; Triton 2.51 ends too if that one held a lock.
            assert status == 503 or (status, answer.get("error")) == (500, NO_MEMORY), (status, answer)
            assert wait_until(answer_again, 20)
            print(json.dumps({"fault": "no memory", "status": status, "seconds": round(time.monotonic() - failed, 2)}))
