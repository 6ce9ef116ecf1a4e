"""A real Triton answers hostile requests with the client's error, and holds little memory for them."""

from __future__ import annotations

import contextlib
import gzip
import http.client
import json
import re
import socket
import struct
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from served import body, post, start

from deploykit.triton.repository import package
from deploykit.triton.server import TritonServer

HUGE = [1_000_000_000, 1]
MOST_MB = 128
"""Most memory that a refused request may add to Triton's peak, in MiB. Without the guard, those here take up to 7.7 GB."""


@pytest.fixture(scope="module")
def server(tiny_export: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    repository = tmp_path_factory.mktemp("repository")
    package(tiny_export, "tiny", repository, engine="onnxruntime", precision="fp32")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DEPLOYKIT_GUARD_READ_S", "3")
        with start(repository) as server:
            yield server


@pytest.fixture
def peak(server: TritonServer) -> Iterator[None]:
    """Fail a test that raises the peak of Triton's memory by much."""
    Path(f"/proc/{server.pid}/clear_refs").write_text("5")
    before = _peak_mb(server.pid)
    yield
    assert _peak_mb(server.pid) - before < MOST_MB
    assert post(server, body(["w1"]))[0] == 200, "others are answered"


def _peak_mb(pid: int) -> int:
    [line] = [x for x in Path(f"/proc/{pid}/status").read_text().splitlines() if x.startswith("VmHWM")]
    return int(line.split()[1]) >> 10


def _send(server: TritonServer, content: bytes, headers: dict[str, str]) -> tuple[int, str]:
    connection = http.client.HTTPConnection(server.urls.http.removeprefix("http://"), timeout=60)
    connection.request("POST", "/v2/models/tiny/infer", content, headers)
    answer = connection.getresponse()
    found = answer.status, answer.read().decode()
    connection.close()
    return found


def _tensor(datatype: str, shape: list[int], data: list[Any]) -> dict[str, Any]:
    return {"inputs": [{"name": "TEXT", "datatype": datatype, "shape": shape, "data": data}]}


@pytest.mark.parametrize("shape", [HUGE, [2**62, 4], [2**63 - 1], [1000, 1000, 1000]], ids=str)
@pytest.mark.parametrize(("datatype", "datum"), [("INT64", 1), ("FP32", 1.0), ("BOOL", True), ("BYTES", "a")])
@pytest.mark.usefixtures("peak")
def test_a_shape_without_its_data_is_refused(server: TritonServer, datatype: str, datum: Any, shape: list[int]) -> None:
    status, answer = post(server, _tensor(datatype, shape, [datum]))
    assert status == 400, answer


@pytest.mark.usefixtures("peak")
def test_a_negative_shape_is_refused(server: TritonServer) -> None:
    for datatype, datum in (("INT64", 1), ("BYTES", "a")):
        status, answer = post(server, _tensor(datatype, [-1, 1], [datum]))
        assert status == 400
        assert "negative" in answer["error"] or "shape" in answer["error"]


@pytest.mark.usefixtures("peak")
def test_many_inputs_together_take_no_more_than_their_size(server: TritonServer) -> None:
    one = {"name": "TEXT", "datatype": "INT64", "shape": [1_000_000, 1], "data": [1]}
    status, _ = post(server, {"inputs": [{**one, "name": f"T{i}"} for i in range(1000)]})
    assert status == 400


def test_a_large_body_that_is_called_a_form_is_read_as_json(server: TritonServer) -> None:
    """curl -d calls any body so."""
    content = json.dumps(body(["w1"], id="x" * (9 << 20))).encode()
    status, answer = _send(server, content, {"Content-Type": "application/x-www-form-urlencoded"})
    assert status == 200, answer[:1000]


@pytest.mark.parametrize("datatype", ["INT64", "BYTES"])
@pytest.mark.parametrize("declared", [4, 10**12, -1])
@pytest.mark.usefixtures("peak")
def test_a_binary_request_that_lies_of_its_size_is_refused(server: TritonServer, datatype: str, declared: int) -> None:
    tensor = {"name": "TEXT", "datatype": datatype, "shape": HUGE, "parameters": {"binary_data_size": declared}}
    head = json.dumps({"inputs": [tensor]}).encode()
    content = head + struct.pack("<I", 2**31) if datatype == "BYTES" else head + b"\x01\0\0\0"
    status, answer = _send(server, content, {"Inference-Header-Content-Length": str(len(head))})
    assert status == 400, answer


def test_strings_that_are_not_complete_fail_no_other_request(server: TritonServer) -> None:
    """Without the guard, Triton's Python backend answers all requests of a batch with the error."""

    def send(data: bytes) -> list[tuple[int, str]]:
        tensor = {"name": "TEXT", "datatype": "BYTES", "shape": [1, 1], "parameters": {"binary_data_size": len(data)}}
        head = json.dumps({"inputs": [tensor]}).encode()
        headers = {"Inference-Header-Content-Length": str(len(head))}
        return [_send(server, head + data, headers) for _ in range(100)]

    bad = (b"\x09\0\0\0a", b"\x01\0\0", b"\x01\0\0\0ab", b"\xff\xff\xff\x7fab")
    with ThreadPoolExecutor(8) as pool:
        refused = [pool.submit(send, data) for data in bad]
        answered = [pool.submit(send, b"\x02\0\0\0w1") for _ in range(4)]
        assert {status for each in answered for status, _ in each.result()} == {200}
        for each in refused:
            assert {status for status, _ in each.result()} == {400}
            assert "TEXT" in each.result()[0][1]


@pytest.mark.parametrize("length", ["99999999999", "-1"])
@pytest.mark.usefixtures("peak")
def test_a_header_length_that_lies_is_refused(server: TritonServer, length: str) -> None:
    status, answer = _send(server, json.dumps(body(["a"])).encode(), {"Inference-Header-Content-Length": length})
    assert status == 400, answer


CONTENT = json.dumps(body(["w1"])).encode()
SIZE = len(CONTENT)


@pytest.mark.parametrize(
    ("headers", "content"),
    [
        ([f"content-length: {SIZE + 9}"], CONTENT),
        ([f"content-length: {2**64 - 1}"], CONTENT),
        ([f"content-length: {10**30}"], CONTENT),
        (["content-length: -5"], CONTENT),
        (["content-length: ten"], CONTENT),
        ([f"content-length: {SIZE}", "transfer-encoding: chunked"], CONTENT),
        (["transfer-encoding: chunked"], b"%x\r\n%s" % (SIZE + 9, CONTENT)),
        (["transfer-encoding: chunked"], b"FFFFFFFFFFFFFFFFFF\r\n" + CONTENT),
    ],
)
@pytest.mark.usefixtures("peak")
def test_a_body_that_does_not_end_ends_its_connection(server: TritonServer, headers: list[str], content: bytes) -> None:
    assert _send_raw(server, headers, content, until=b"more than comes") == b""


@pytest.mark.parametrize(
    ("headers", "content", "status"),
    [
        ([f"content-length: {SIZE - 9}"], CONTENT, b"400"),
        ([f"content-length: {SIZE}"] * 2, CONTENT, b"200"),
        (["transfer-encoding: chunked"], b"%x\r\n%s\r\n0\r\n\r\n" % (SIZE, CONTENT), b"200"),
    ],
)
def test_a_body_that_is_shorter_than_it_came_is_answered(
    server: TritonServer, headers: list[str], content: bytes, status: bytes
) -> None:
    assert _send_raw(server, headers, content, until=b"\r\n").split()[1] == status


def test_a_connection_that_waits_for_its_next_request_stays_open(server: TritonServer) -> None:
    methods = {"/v2/health/ready": "GET", "/v2/models/tiny/infer": "POST", "/v2/models/tiny": "GET"}
    with contextlib.ExitStack() as stack:
        connections = {
            route: stack.enter_context(
                contextlib.closing(http.client.HTTPConnection(server.urls.http.removeprefix("http://"), timeout=60))
            )
            for route in methods
        }

        def ask_all() -> list[socket.socket]:
            for route, connection in connections.items():
                connection.request(methods[route], route, CONTENT)
                assert connection.getresponse().read() is not None
            return [connection.sock for connection in connections.values()]

        used = ask_all()
        assert all(used)
        time.sleep(5)
        assert ask_all() == used


def _send_raw(server: TritonServer, headers: list[str], content: bytes, until: bytes) -> bytes:
    """Return what comes, up to ``until`` or the end of the connection."""
    host, port = server.urls.http.removeprefix("http://").split(":")
    answer = b""
    with socket.create_connection((host, int(port)), timeout=30) as client:
        client.sendall(
            "\r\n".join(["POST /v2/models/tiny/infer HTTP/1.1", "host: x", *headers, "\r\n"]).encode() + content
        )
        while until not in answer and (part := client.recv(4096)):
            answer += part
    return answer


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
@pytest.mark.usefixtures("peak")
def test_a_compressed_request_that_grows_without_end_is_refused(server: TritonServer, encoding: str) -> None:
    compress = gzip.compress if encoding == "gzip" else zlib.compress
    bomb = compress(b'{"inputs": [' + bytes(192 << 20), 1)
    status, answer = _send(server, bomb, {"Content-Encoding": encoding})
    assert status == 400, answer
    assert "decompression" in answer


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
def test_a_damaged_compressed_request_is_refused(server: TritonServer, encoding: str) -> None:
    compress = gzip.compress if encoding == "gzip" else zlib.compress
    whole = compress(json.dumps(body(["w1 w2"])).encode())
    for damaged in (b"nothing", whole[:-4] + bytes(4)):
        status, answer = _send(server, damaged, {"Content-Encoding": encoding})
        assert (status, "decompression failed" in answer) == (400, True), answer


def test_a_request_without_a_body_is_refused_but_a_text_as_the_body_is_answered(server: TritonServer) -> None:
    status, answer = _send(server, b"", {})
    assert (status, "the request has no body" in answer) == (400, True), answer
    assert _send(server, gzip.compress(b""), {"Content-Encoding": "gzip"})[0] == 400
    headers = ["inference-header-content-length: 0", "content-length: 5"]
    assert _send_raw(server, headers, b"w1 w2", until=b"\r\n").split()[1] == b"200"


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
def test_a_compressed_request_is_answered(server: TritonServer, encoding: str) -> None:
    compress = gzip.compress if encoding == "gzip" else zlib.compress
    words = " ".join(f"w{i * 7919 % 1000}" for i in range(100_000))
    status, answer = _send(server, compress(json.dumps(body([words])).encode()), {"Content-Encoding": encoding})
    assert status == 200, answer


@pytest.mark.parametrize(
    "content", [b'{"inputs": [', b"[]", b"nothing", b"\xff\xfe", b'{"inputs": 1}', b'{"inputs": [1]}', b"[" * 100_000]
)
@pytest.mark.usefixtures("peak")
def test_malformed_json_is_the_clients_error(server: TritonServer, content: bytes) -> None:
    assert _send(server, content, {})[0] == 400


@pytest.mark.parametrize(
    "field",
    [{"data": [1]}, {"data": [None]}, {"data": "a"}, {"data": {}}, {"shape": "a"}, {"shape": [1.5]}, {"name": 1}],
)
def test_a_field_of_the_wrong_type_is_the_clients_error(server: TritonServer, field: dict[str, Any]) -> None:
    content = body(["a"])
    content["inputs"][0].update(field)
    assert post(server, content)[0] == 400


@pytest.mark.parametrize("raw", [False, True], ids=["contents", "raw"])
@pytest.mark.parametrize("datatype", ["INT64", "BYTES", "FP32"])
@pytest.mark.usefixtures("peak")
def test_a_shape_without_its_data_is_refused_over_grpc(server: TritonServer, datatype: str, raw: bool) -> None:
    import grpc
    from tritonclient.grpc import service_pb2, service_pb2_grpc

    tensor = service_pb2.ModelInferRequest.InferInputTensor(name="TEXT", datatype=datatype, shape=HUGE)
    request = service_pb2.ModelInferRequest(model_name="tiny", inputs=[tensor])
    if raw:
        request.raw_input_contents.append(b"\x01\0\0\0\0\0\0\0")
    elif datatype == "BYTES":
        request.inputs[0].contents.bytes_contents.append(b"a")
    else:
        getattr(request.inputs[0].contents, "int64_contents" if datatype == "INT64" else "fp32_contents").append(1)
    with grpc.insecure_channel(server.urls.grpc) as channel, pytest.raises(grpc.RpcError) as caught:
        service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer(request)
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.usefixtures("peak")
def test_a_compressed_message_that_grows_without_end_is_refused_over_grpc(server: TritonServer) -> None:
    import grpc
    from tritonclient.grpc import service_pb2, service_pb2_grpc

    tensor = service_pb2.ModelInferRequest.InferInputTensor(name="TEXT", datatype="BYTES", shape=[1, 1])
    request = service_pb2.ModelInferRequest(model_name="tiny", inputs=[tensor], raw_input_contents=[bytes(192 << 20)])
    options = [("grpc.max_send_message_length", -1)]
    with grpc.insecure_channel(server.urls.grpc, options=options) as channel, pytest.raises(grpc.RpcError):
        service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer(request, compression=grpc.Compression.Gzip)


def test_errors_of_streams_that_ask_for_codes_do_not_end_triton(server: TritonServer) -> None:
    """Without the guard, the first or second ends Triton 2.51."""
    import grpc
    from tritonclient.grpc import service_pb2, service_pb2_grpc

    tensor = service_pb2.ModelInferRequest.InferInputTensor(name="TEXT", datatype="BYTES", shape=[1, 1])
    requests = [
        service_pb2.ModelInferRequest(model_name="tiny", inputs=[tensor], raw_input_contents=[raw])
        for raw in (b"\x09\0\0\0a", b"\x01\0\0\0\xff", b"\x01\0\0\0a")
    ]
    with grpc.insecure_channel(server.urls.grpc) as channel:
        ask = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelStreamInfer
        for _ in range(20):
            told = [
                [
                    answer.error_message
                    for answer in ask(iter([one]), timeout=20, metadata=[("triton_grpc_error", "true")])
                ]
                for one in requests
            ]
            assert [bool(message) for [message] in told] == [True, True, False]


@pytest.mark.parametrize(("output", "answered"), [("SCORES", True), ("LABEL", False)])
def test_classes_of_texts_are_refused(server: TritonServer, output: str, answered: bool) -> None:
    """Without the guard, Triton 2.51 divides by zero."""
    import grpc
    from tritonclient.grpc import service_pb2, service_pb2_grpc

    wanted = [{"name": output, "parameters": {"classification": 1}}]
    assert (post(server, body(["w1"], outputs=wanted))[0] == 200) == answered
    request = service_pb2.ModelInferRequest(model_name="tiny", raw_input_contents=[b"\x02\0\0\0w1"])
    request.inputs.add(name="TEXT", datatype="BYTES", shape=[1, 1])
    request.outputs.add(name=output).parameters["classification"].int64_param = 1
    with grpc.insecure_channel(server.urls.grpc) as channel:
        ask = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer
        if answered:
            assert ask(request).outputs[0].name == output
        else:
            with pytest.raises(grpc.RpcError, match="class result not available for output") as caught:
                ask(request)
            assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert post(server, body(["w1"]))[0] == 200, "others are answered"


def test_an_error_that_quotes_a_long_request_arrives_over_grpc(server: TritonServer) -> None:
    import grpc
    from tritonclient.grpc import service_pb2, service_pb2_grpc

    with grpc.insecure_channel(server.urls.grpc) as channel, pytest.raises(grpc.RpcError) as caught:
        service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer(
            service_pb2.ModelInferRequest(model_name="tiny", id="é" * 9000), timeout=20
        )
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert re.fullmatch("(?s)\\[request id: é+ … é+\\] .*TEXT.*", caught.value.details())


def test_the_models_processes_do_not_have_the_guard(server: TritonServer) -> None:
    processes = [psutil.Process(server.pid), *psutil.Process(server.pid).children()]
    guarded = ["guard.so" in Path(f"/proc/{process.pid}/maps").read_text() for process in processes]
    assert guarded == [True, *[False] * (len(processes) - 1)]
    assert np.all(["LD_PRELOAD" not in process.environ() for process in processes[1:]])
