"""A model behind HTTP without Triton, from the view of Triton's clients."""

from __future__ import annotations

import http.client
import json
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.http as triton
from google.protobuf.json_format import MessageToDict
from tritonclient.utils import InferenceServerException

from deploykit.artifacts import load_manifest
from deploykit.errors import DeploykitError, ServerError
from deploykit.tasks.classification.served import ServedClassifier
from deploykit.tasks.opening import open_graph
from deploykit.triton.in_process import InProcessModel
from deploykit.triton.kserve import MAX_BODY_BYTES, KServeServer
from deploykit.triton.repository import package, read_config

TEXTS = ["w1 w2 w3", "", "😀 w5", "w1\0w2", *(f"w{i} w{i * 7 % 200} " * (i % 30 + 1) for i in range(150))]


def load(repository: Path, export: Path, **changed: Any) -> InProcessModel:
    package(export, "tiny", repository, engine="onnxruntime", precision="fp32")
    config = MessageToDict(read_config(repository / "tiny" / "config.pbtxt"), preserving_proto_field_name=True)
    return InProcessModel("tiny", repository / "tiny", "1", {**config, **changed})


@pytest.fixture(scope="module")
def model(tiny_export: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[InProcessModel]:
    model = load(tmp_path_factory.mktemp("repository"), tiny_export)
    yield model
    model.close()


@pytest.fixture(scope="module")
def server(model: InProcessModel) -> Iterator[KServeServer]:
    with KServeServer(model, "127.0.0.1", 0) as server:
        yield server


Ask = Callable[..., tuple[int, Any]]


@pytest.fixture(scope="module")
def ask(server: KServeServer) -> Iterator[Ask]:
    """Send requests on one connection. Returns status and JSON of each."""
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=30)

    def request(
        method: str, path: str, content: Any = None, headers: Mapping[str, str] | None = None
    ) -> tuple[int, Any]:
        data = content if isinstance(content, bytes) or content is None else json.dumps(content).encode()
        connection.request(method, path, data, headers or {})
        response = connection.getresponse()
        body = response.read()
        return response.status, json.loads(body) if body else None

    yield request
    connection.close()


def of(texts: list[Any], **extra: Any) -> dict[str, Any]:
    return {"inputs": [{"name": "TEXT", "datatype": "BYTES", "shape": [len(texts), 1], "data": texts}], **extra}


INFER = "/v2/models/tiny/infer"


def test_our_client_gets_the_answers_of_this_process_bit_for_bit(server: KServeServer, tiny_export: Path) -> None:
    expected = open_graph(tiny_export, load_manifest(tiny_export), engine="onnxruntime", precision="fp32").scores(TEXTS)
    client = ServedClassifier("tiny", server.url)
    np.testing.assert_array_equal(client.scores(TEXTS), expected)
    assert [row.label for row in client.predict_rows(TEXTS)] == client.task.decide(expected)
    client.close()


def test_a_connection_that_the_server_closed_is_renewed(model: InProcessModel) -> None:
    with KServeServer(model, "127.0.0.1", 0) as server, closing(ServedClassifier("tiny", server.url)) as client:
        (connection,) = client._idle
        connection._connection.sock.shutdown(socket.SHUT_RDWR)
        assert len(client.scores(["w1"])) == 1
        assert connection not in client._idle


def test_tritons_own_client_is_answered_in_json_and_in_binary(server: KServeServer) -> None:
    client = triton.InferenceServerClient(server.url.removeprefix("http://"))
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("tiny")
    metadata = client.get_model_metadata("tiny")
    assert metadata["inputs"] == [{"name": "TEXT", "datatype": "BYTES", "shape": [-1, 1]}]
    assert {"name": "SCORES", "datatype": "FP32", "shape": [-1, 3]} in metadata["outputs"]
    answers = []
    for binary in (True, False):
        text = triton.InferInput("TEXT", [2, 1], "BYTES")
        text.set_data_from_numpy(np.array([["w1 é"], ["w2"]], np.object_), binary_data=binary)
        wanted = [triton.InferRequestedOutput(n, binary_data=binary) for n in ("SCORES", "TOP_LABELS")]
        answer = client.infer("tiny", [text], outputs=wanted, parameters={"top_k": 2}, request_id="7")
        assert answer.get_response()["id"] == "7"
        answers.append((answer.as_numpy("SCORES"), answer.as_numpy("TOP_LABELS").astype(str)))
    assert answers[0][1].shape == (2, 2)
    for binary_part, json_part in zip(*answers):
        np.testing.assert_array_equal(binary_part, json_part)
    # Without outputs, the client requests all with a parameter that is not the model's.
    assert client.infer("tiny", [text], priority=1, timeout=1000).as_numpy("LABEL").shape == (2, 1)
    with pytest.raises(InferenceServerException, match="unknown model: 'other'"):
        client.infer("other", [text])
    client.close()


def test_one_bad_row_has_an_error_of_its_own(ask: Ask) -> None:
    status, answer = ask("POST", INFER, of(["w1", "a" * 1_100_000]))
    assert status == 200
    outputs = {output["name"]: output["data"] for output in answer["outputs"]}
    assert outputs["ERROR"][0] == ""
    assert "characters" in outputs["ERROR"][1]
    assert set(outputs) == {"LABEL", "SCORES", "ERROR", "TOP_LABELS", "TOP_SCORES"}, "asked for none, all come"


@pytest.mark.parametrize(
    ("content", "status", "named"),
    [
        (b"{", 400, "JSON"),
        (b"[" * 100_000, 400, "JSON"),
        (b"[1]", 400, "inputs"),
        ({"inputs": "TEXT"}, 400, "inputs"),
        ({"inputs": [7]}, 400, "objects"),
        ({"inputs": []}, 400, "expected 1 input"),
        ({"inputs": [{"name": "OTHER"}]}, 400, "OTHER"),
        ({"inputs": [{"name": "TEXT", "datatype": "INT32"}]}, 400, "INT32"),
        ({"inputs": [{"name": "TEXT", "datatype": "BYTES", "shape": [2, 1], "data": ["w1"]}]}, 400, "shape"),
        ({"inputs": [{"name": "TEXT", "datatype": "BYTES", "shape": [1], "data": ["w1"]}]}, 400, "shape"),
        ({"inputs": [{"name": "TEXT", "datatype": "BYTES", "shape": [1, 1], "data": "w1"}]}, 400, "list of data"),
        (of([7]), 400, "7"),
        (of([]), 400, "no rows"),
        (of(["w1"] * 65), 400, "batch-size must be <= 64"),
        (of(["w1"], outputs=[{"name": "LOGITS"}]), 400, "LOGITS"),
        (of(["w1"], outputs={}), 200, ""),
        (of(["w1"], outputs="LABEL"), 400, "outputs"),
        (of(["w1"], parameters=3), 400, "parameters"),
        (of(["w1"], parameters={"top_k": 0}), 400, "top_k"),
        (of(["w1"], parameters={"topk": 2}), 400, "unknown parameter topk: known ones are top_k"),
        (of(["\ud800"]), 400, "row 0 of TEXT: the text is not UTF-8"),
        (of(["w1", "\ud800"], outputs=[{"name": "SCORES"}]), 400, "row 1 of TEXT: the text is not UTF-8"),
        (of(["w1", "\ud800"], outputs=[{"name": "SCORES"}, {"name": "ERROR"}]), 200, "the text is not UTF-8"),
    ],
)
def test_bad_requests_are_refused_and_the_connection_goes_on(ask: Ask, content: Any, status: int, named: str) -> None:
    got, answer = ask("POST", INFER, content)
    assert got == status
    assert named in str(answer)
    assert ask("POST", INFER, of(["w1"]))[0] == 200


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/v2", 200), ("GET", "/v2/models/tiny/versions/1", 200), ("GET", "/v2/models/tiny/versions/2", 404),
     ("GET", "/v2/models/other/config", 404), ("GET", "/metrics", 404), ("GET", "/v2/models/tiny/../x", 404),
     ("GET", INFER, 405), ("POST", "/v2/models/tiny", 405), ("POST", "/v2/models/tiny/versions/1/infer", 200)],
)  # fmt: skip
def test_paths_are_answered_as_triton_answers_them(ask: Ask, method: str, path: str, status: int) -> None:
    assert ask(method, path, of(["w1"]) if method == "POST" else None)[0] == status


@pytest.mark.parametrize(
    ("data", "size"), [(b"\x02\0\0\0w1", 7), (b"\x02\0\0\0w", 5), (b"\x02\0", 2), (b"\xff\xff\xff\xffw1", 6)]
)
def test_damaged_binary_tensors_are_refused(ask: Ask, data: bytes, size: int) -> None:
    tensor = {"name": "TEXT", "datatype": "BYTES", "shape": [1, 1], "parameters": {"binary_data_size": size}}
    head = json.dumps({"inputs": [tensor]}).encode()
    status, answer = ask("POST", INFER, head + data, {"Inference-Header-Content-Length": str(len(head))})
    assert status == 400
    assert "binary data" in answer["error"]


def test_bodies_too_large_or_without_a_length_are_refused_unread(ask: Ask) -> None:
    for headers, status in (
        ({"Content-Length": str(MAX_BODY_BYTES + 1)}, 413),
        ({"Content-Length": "many"}, 400),
        ({"Transfer-Encoding": "chunked"}, 411),
    ):
        assert ask("POST", INFER, b"", headers)[0] == status
    assert ask("GET", "/v2/health/ready")[0] == 200


def test_requests_that_wait_share_a_batch_and_a_full_queue_says_503(tiny_export: Path, tmp_path: Path) -> None:
    policy = {"dynamic_batching": {"default_queue_policy": {"max_queue_size": 2}}}
    model = load(tmp_path, tiny_export, **policy)
    execute, entered, go_on = model._model.execute, threading.Event(), threading.Event()
    sizes = []

    def slowly(requests: Any) -> Any:
        sizes.append(len(requests))
        entered.set()
        assert go_on.wait(30)
        return execute(requests)

    model._model.execute = slowly
    with KServeServer(model, "127.0.0.1", 0) as server, ThreadPoolExecutor() as pool, ExitStack() as clients:
        client = lambda: clients.enter_context(closing(ServedClassifier("tiny", server.url, patience=0)))  # noqa: E731
        first = pool.submit(client().scores, ["w1"])
        assert entered.wait(30)
        waiting = [pool.submit(client().scores, [f"w{i}"]) for i in (2, 3)]
        while model._queue.qsize() < 2:
            threading.Event().wait(0.01)
        with pytest.raises(ServerError, match="overloaded: Exceeds maximum queue size"):
            client().scores(["w4"])
        go_on.set()
        assert all(len(answer.result()) == 1 for answer in (first, *waiting))
    model.close()
    assert sizes == [1, 2]


def test_a_failing_model_answers_500_without_its_secrets(model: InProcessModel, ask: Ask) -> None:
    execute = model._model.execute

    def fail(requests: Any) -> Any:
        raise RuntimeError("/secret/path")

    model._model.execute = fail
    try:
        status, answer = ask("POST", INFER, of(["w1"]))
    finally:
        model._model.execute = execute
    assert status == 500
    assert answer["error"] == "the model failed on this request: RuntimeError"
    assert ask("POST", INFER, of(["w1"]))[0] == 200


def test_a_taken_port_and_a_damaged_model_are_named(
    model: InProcessModel, server: KServeServer, tiny_export: Path, tmp_path: Path
) -> None:
    with pytest.raises(ServerError, match="in use"):
        KServeServer(model, "127.0.0.1", int(server.url.rpartition(":")[2]))
    with pytest.raises(ServerError, match="70000"):
        KServeServer(model, "127.0.0.1", 70000)
    load(tmp_path, tiny_export).close()
    (tmp_path / "tiny/1/model.onnx").write_bytes(b"changed")
    with pytest.raises(DeploykitError, match="as in its manifest"):
        load(tmp_path, tiny_export)


def test_the_device_needs_numpy_tokenizers_and_one_engine_alone() -> None:
    program = (
        "import sys, deploykit.jetson.device, deploykit.triton.kserve, deploykit.bench.run\n"
        "from deploykit.triton import in_process; in_process._backend_module()\n"
        "import deploykit.tasks.classification.triton_backend, deploykit.runtime.engines.onnxruntime\n"
        "found = {name.partition('.')[0] for name in sys.modules} - set(sys.stdlib_module_names)\n"
        "print(sorted(n for n in found if getattr(sys.modules.get(n), '__file__', None) and not n.startswith('_')))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['deploykit', 'numpy', 'onnxruntime', 'tokenizers', 'triton_python_backend_utils']"
