"""Requests that clients cancel or leave, also when they are about to end. Without the guard, Triton 2.51 ends, or keeps them for ever."""

from __future__ import annotations

import json
import random
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from grpc import RpcError, StatusCode, insecure_channel
from language_models import write_export
from served import body, post, start
from tritonclient.grpc import service_pb2, service_pb2_grpc

from deploykit.runtime.served import parse_url
from deploykit.runtime.serving_settings import ServingSettings
from deploykit.tasks.text_generation.chat_template import CHATML
from deploykit.triton.repository import package

CLIENTS = 8


@pytest.fixture(scope="module")
def repository(tiny_export: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    repository = tmp_path_factory.mktemp("repository")
    export = write_export(tmp_path_factory.mktemp("lm") / "export", template=CHATML, max_position_embeddings=4096)
    package(export, "lm", repository, settings=ServingSettings(threads=1))
    package(
        tiny_export, "tiny", repository, engine="onnxruntime", precision="fp32", settings=ServingSettings(threads=1)
    )
    return repository


def _request(model: str, text: str, **tensors: tuple[str, bytes]) -> Any:
    tensors = {
        "text_input" if model == "lm" else "TEXT": ("BYTES", struct.pack("<I", len(text)) + text.encode()),
        **tensors,
    }
    request = service_pb2.ModelInferRequest(model_name=model, raw_input_contents=[raw for _, raw in tensors.values()])
    for name, (kind, _) in tensors.items():
        request.inputs.add(name=name, datatype=kind, shape=[1] if model == "lm" else [1, 1])
    return request


def _stream(tokens: int) -> Any:
    request = _request("lm", "list the file", stream=("BOOL", b"\1"))
    request.parameters["max_tokens"].int64_param = tokens
    request.parameters["ignore_eos"].bool_param = True
    return iter([request])


def _leave_streams(ask: service_pb2_grpc.GRPCInferenceServiceStub, drawn: random.Random) -> None:
    tokens = drawn.randint(1, 5)
    call = ask.ModelStreamInfer(_stream(tokens), timeout=60)
    for _ in range(drawn.randint(1, tokens + 1)):
        next(call, None)
    call.cancel()


def _give_up(ask: service_pb2_grpc.GRPCInferenceServiceStub, drawn: random.Random) -> None:
    call = ask.ModelInfer.future(
        _request("tiny", "a day " * drawn.randint(1, 20)), timeout=drawn.choice([60, 0.002, 0.005])
    )
    if drawn.random() < 0.5:
        time.sleep(drawn.random() * 0.01)
        call.cancel()
        return
    try:
        call.result()
    except RpcError as error:
        assert error.code() == StatusCode.DEADLINE_EXCEEDED  # noqa: PT017 (nearly all others are answered)


@pytest.mark.parametrize("leave", [_leave_streams, _give_up])
def test_requests_that_are_cancelled_at_their_end_neither_end_triton_nor_stay(
    repository: Path, leave: Callable[[service_pb2_grpc.GRPCInferenceServiceStub, random.Random], None]
) -> None:
    def leave_often(number: int) -> None:
        drawn = random.Random(number)
        with insecure_channel(server.urls.grpc) as channel:
            ask = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            for _ in range(150):
                leave(ask, drawn)

    # While Triton writes its log, what it does at once takes longer: without the guard it ends here nearly every time.
    with start(repository, drain=40.0, verbose=True) as server:
        with ThreadPoolExecutor(CLIENTS) as pool:
            list(pool.map(leave_often, range(CLIENTS)))
        begun = time.monotonic()
        server.stop()
        assert time.monotonic() - begun < 20  # 40 if it waits for requests that it keeps


def test_a_client_that_leaves_cancels_no_request_of_the_next_one_on_its_connections_number(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a busy machine the guard learns late that a client has left."""
    library, source = tmp_path / "late_epoll.so", Path(__file__).parents[1] / "support/late_epoll.c"
    compiler = [sys.executable, "-m", "ziglang", "cc", "-O1", "-shared", "-fPIC", "-target", "x86_64-linux-gnu.2.17"]
    subprocess.run([*compiler, source, "-o", library, "-ldl"], check=True)
    stop = threading.Event()

    def ask() -> list[tuple[int, Any]]:
        answers = []
        while not stop.is_set():
            answers.append(post(server, body(["a day"])))
        return answers

    monkeypatch.setenv("LD_PRELOAD", str(library))
    with start(repository) as server, ThreadPoolExecutor(CLIENTS) as pool:
        asking = [pool.submit(ask) for _ in range(CLIENTS)]
        host, port = parse_url(server.urls.http)[0].split(":")
        content = json.dumps(body(["a day"])).encode()
        head = f"POST /v2/models/tiny/infer HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(content)}\r\n\r\n"
        for _ in range(150):
            with socket.create_connection((host, int(port))) as leaving:
                leaving.sendall(head.encode() + content)
            time.sleep(0.02)
        stop.set()
        answers = [answer for one in asking for answer in one.result()]
    assert [answer for answer in answers if answer[0] != 200] == []


@pytest.fixture
def busy(repository: Path) -> Iterator[Any]:
    with start(repository) as server, insecure_channel(server.urls.grpc) as channel:
        ask = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        ended = threading.Event()

        def ask_on() -> None:
            while not ended.is_set():
                ask.ModelInfer(_request("tiny", "a day"), timeout=60)

        with ThreadPoolExecutor(2) as pool:
            asking = [pool.submit(ask_on) for _ in range(2)]
            yield ask
            ended.set()
            for one in asking:
                one.result()


def _text(responses: Iterable[Any]) -> bytes:
    return b"".join(response.infer_response.raw_output_contents[0][4:] for response in responses)


def test_a_client_that_reads_slowly_gets_all_of_its_stream(busy: Any) -> None:
    """The guard deletes the request, which Triton has answered whole and still holds, after 3 s."""
    whole = _text(busy.ModelStreamInfer(_stream(3900), timeout=120))
    slow = busy.ModelStreamInfer(_stream(3900), timeout=120)
    begin = _text([next(slow)])
    time.sleep(8)
    assert begin + _text(slow) == whole
    left = busy.ModelStreamInfer(_stream(3900), timeout=120)
    next(left)
    time.sleep(8)
    left.cancel()
    assert _text(busy.ModelStreamInfer(_stream(3900), timeout=120)) == whole
