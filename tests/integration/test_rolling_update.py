"""A server takes the place of another under load: no request is lost."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from language_models import write_export
from served import body, outputs, wait_until
from switched_proxy import switched_proxy
from tritonclient.grpc import service_pb2, service_pb2_grpc

from deploykit.runtime.serving_settings import ServingSettings
from deploykit.tasks.text_generation.chat_template import CHATML
from deploykit.triton.repository import package

PORTS = ("http", "grpc", "openai")


@pytest.fixture(scope="module")
def repository(tiny_export: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rolling")
    package(tiny_export, "tiny", folder / "repository", engine="onnxruntime", precision="fp32")
    package(
        write_export(folder / "lm", template=CHATML), "lm", folder / "repository", settings=ServingSettings(threads=1)
    )
    return folder / "repository"


@contextlib.contextmanager
def serving(repository: Path, ready: Path) -> Iterator[tuple[subprocess.Popen[str], dict[str, str]]]:
    """Run ``deploykit serve`` and yield it with the addresses of its ports, once it is ready."""
    ports = [word for name in (*PORTS, "metrics") for word in (f"--{name}-port", "0")]
    command = [sys.executable, "-m", "deploykit", "serve", "--model-repository", str(repository), *ports]
    with subprocess.Popen([*command, "--ready-file", str(ready)], stderr=subprocess.PIPE, text=True) as run:
        try:
            assert wait_until(lambda: ready.exists() or run.poll() is not None, 120)
            assert ready.exists(), run.communicate()[1]
            found = json.loads(ready.read_text())
            yield run, {name: found[name].removeprefix("http://").removesuffix("/v1") for name in PORTS}
        finally:
            run.terminate()


def by_http(address: str, path: str, content: Any) -> bytes:
    """Send a request on a connection of its own, as a proxy does, and return its answer."""
    connection = http.client.HTTPConnection(address, timeout=60)
    with contextlib.closing(connection):
        connection.request("POST", path, json.dumps(content), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        found = answer.read()
        assert answer.status == 200, (answer.status, found)
        return found


def classify(address: str) -> Any:
    return outputs(json.loads(by_http(address, "/v2/models/tiny/infer", body(["w1 w2"]))))


def classify_by_grpc(address: str) -> Any:
    message = service_pb2.ModelInferRequest(model_name="tiny", raw_input_contents=[struct.pack("<I", 5) + b"w1 w2"])
    message.inputs.add(name="TEXT", datatype="BYTES", shape=[1, 1])
    with grpc.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
        return list(
            service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer(message, timeout=60).raw_output_contents
        )


def stream(address: str) -> str:
    content = {
        "model": "lm", "messages": [{"role": "user", "content": "list the file"}], "stream": True, "max_tokens": 60, "seed": 1,
        "logit_bias": {"2": -100},
    }  # fmt: skip
    events = by_http(address, "/v1/chat/completions", content).decode().split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
    return "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"])


ASKED: dict[str, Callable[[str], Any]] = {"http": classify, "grpc": classify_by_grpc, "openai": stream}


def test_no_request_is_lost_while_a_server_replaces_another(repository: Path, tmp_path: Path) -> None:
    stop = threading.Event()
    with contextlib.ExitStack() as stack:
        old, at_old = stack.enter_context(serving(repository, tmp_path / "old.json"))
        proxies = {name: stack.enter_context(switched_proxy(at_old[name])) for name in PORTS}

        def ask(name: str) -> list[Any]:
            found = []
            while not stop.is_set():
                found.append(ASKED[name](proxies[name].own_address))
                time.sleep(0.02)
            return found

        expected = {name: ASKED[name](at_old[name]) for name in PORTS}
        pool = stack.enter_context(ThreadPoolExecutor(12))
        stack.callback(stop.set)
        clients = {name: [pool.submit(ask, name) for _ in range(4)] for name in PORTS}
        _, at_new = stack.enter_context(serving(repository, tmp_path / "new.json"))
        for name, proxy in proxies.items():
            proxy.address = at_new[name]
        os.kill(old.pid, signal.SIGTERM)  # with streams and requests in flight
        _, printed = old.communicate(timeout=60)
        assert old.returncode == 0, printed
        time.sleep(2)
        stop.set()
        for name, asking in clients.items():
            answers = [answer for client in asking for answer in client.result()]
            assert len(answers) > 20, name
            assert all(answer == expected[name] for answer in answers), name
