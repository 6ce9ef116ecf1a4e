"""A real Triton with our backend, from the view of clients and operators, and with crashes."""

from __future__ import annotations

import dataclasses
import http.client
import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import psutil
import pytest
from paths import ROOT
from served import body, family, gone, outputs, post, start, supervised, wait_until

from deploykit.artifacts import digest_path, load_manifest, write_manifest
from deploykit.errors import (
    ArtifactError,
    CorruptArtifactError,
    MissingDependencyError,
    RequestError,
    ServerError,
    UsageError,
)
from deploykit.locks import lock
from deploykit.runtime.served import parse_url
from deploykit.runtime.serving_settings import ServingSettings
from deploykit.tasks.classification.served import ServedClassifier
from deploykit.tasks.opening import open_graph
from deploykit.triton import preflight
from deploykit.triton.repository import config_text, list_models, package, validate_config
from deploykit.triton.server import TritonServer

LONG = 64 * ["w1 w2 w3 w4 " * 10_000]
"""A request that takes a while: a batch of texts of 120,000 characters."""

TEXTS = [
    "w1 w2 w3",
    "w7",
    "",
    "😀 w5 👩‍👩‍👧 w6",
    "這個產品 w8 很好",
    "שלום w9 مرحبا w10",
    "w1\0w2",
    "w11 " * 25_000,
    *(f"w{i} w{i * 7 % 200} " * (i % 30 + 1) for i in range(192)),
]


@pytest.fixture(scope="module")
def repository(tiny_export: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    repository = tmp_path_factory.mktemp("repository")
    package(tiny_export, "tiny", repository, engine="onnxruntime", precision="fp32")
    short_queue = ServingSettings(max_queue_size=1, max_batch_size=64)
    package(tiny_export, "short-queue", repository, engine="onnxruntime", precision="fp32", settings=short_queue)
    (repository / "unpackaged").mkdir()
    shutil.copy(repository / "tiny" / "config.pbtxt", repository / "unpackaged")
    return repository


@pytest.fixture(scope="module")
def server(repository: Path) -> Iterator[TritonServer]:
    with start(repository) as server:
        yield server


@pytest.fixture
def own_repository(tiny_export: Path, tmp_path: Path) -> Path:
    """A repository that the test may damage, in a folder with spaces and letters beyond ASCII."""
    repository = tmp_path / "ma réserve 模型"
    package(tiny_export, "tiny", repository, engine="onnxruntime", precision="fp32")
    return repository


@pytest.fixture(scope="module")
def expected(tiny_export: Path) -> np.ndarray[Any, Any]:
    """Scores of TEXTS from the same model in this process."""
    classifier = open_graph(tiny_export, load_manifest(tiny_export), engine="onnxruntime", precision="fp32")
    return classifier.scores(TEXTS)


# Clients


def test_answers_equal_those_in_process_bit_for_bit(server: TritonServer, expected: np.ndarray[Any, Any]) -> None:
    client = ServedClassifier("tiny", server.urls.http)
    np.testing.assert_array_equal(client.scores(TEXTS), expected)
    assert [row.label for row in client.predict_rows(TEXTS)] == client.task.decide(expected)
    assert client.scores([]).shape == (0, 3)
    client.close()


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_a_plain_tritonclient_is_answered(server: TritonServer, expected: np.ndarray[Any, Any], protocol: str) -> None:
    triton = importlib.import_module(f"tritonclient.{protocol}")
    text = triton.InferInput("TEXT", [2, 1], "BYTES")
    text.set_data_from_numpy(np.array([[t.encode()] for t in TEXTS[:2]], np.object_))
    with triton.InferenceServerClient(getattr(server.urls, protocol).removeprefix("http://")) as client:
        answer = client.infer("tiny", [text])
    np.testing.assert_array_equal(answer.as_numpy("SCORES"), expected[:2])
    assert answer.as_numpy("LABEL").shape == (2, 1)
    assert answer.as_numpy("TOP_LABELS").shape == (2, 3)


def test_the_containers_health_check_asks_each_model(server: TritonServer, repository: Path) -> None:
    from deploykit.triton.container.health import check

    (problem,) = check(repository, server.urls.http)
    assert problem.startswith("unpackaged: HTTP Error"), "and no other model"
    (_, _, problem) = check(repository, "http://127.0.0.1:9")
    assert "Connection refused" in problem


def test_plain_json_is_answered(server: TritonServer, expected: np.ndarray[Any, Any]) -> None:
    status, answer = post(server, body(TEXTS[:8]))
    assert status == 200
    np.testing.assert_array_equal(np.float32(outputs(answer)["SCORES"]).reshape(8, 3), expected[:8])
    assert outputs(answer)["ERROR"] == [""] * 8


@pytest.mark.parametrize(
    ("content", "statuses", "message"),
    [
        ({"inputs": [{"name": "TXT", "datatype": "BYTES", "shape": [1, 1], "data": ["a"]}]}, {400}, "TXT"),
        ({"inputs": [{"name": "TEXT", "datatype": "INT64", "shape": [1, 1], "data": [1]}]}, {400}, "TEXT"),
        (body([]), {400}, "TEXT"),
        (body(["a"] * 65), {400}, "batch-size must be <= 64"),
        (b'{"inputs": [', {400}, "parse"),
        (body(["x" * 1_000_001]), {400}, "row 0 of TEXT: the text has 1000001 characters"),
        (body(["a"], parameters={"top_k": 0}), {400}, "top_k must be an integer from 1, not 0"),
        (body(["a"], parameters={"top_k": "many"}), {400}, "top_k"),
        (body(["a"], parameters={"top_k": True}), {400}, "top_k"),
        (body(["a"], parameters={"topk": 1}), {400}, "unknown parameter topk"),
    ],
    ids=[
        "name",
        "dtype",
        "empty",
        "oversized",
        "truncated",
        "all bad",
        "top_k 0",
        "top_k text",
        "top_k bool",
        "unknown parameter",
    ],
)
def test_a_wrong_request_is_refused_by_name(
    server: TritonServer, content: Any, statuses: set[int], message: str
) -> None:
    status, answer = post(server, content)
    assert status in statuses
    assert message in answer["error"]
    assert "File " not in answer["error"]
    assert post(server, body(["w1"]))[0] == 200


def test_an_unknown_model_is_refused(server: TritonServer) -> None:
    assert post(server, body(["a"]), "nobody")[0] == 404
    with pytest.raises(RequestError, match="nobody") as caught:
        ServedClassifier("nobody", server.urls.http)
    assert caught.value.status == 404


def test_a_bad_row_fails_alone(server: TritonServer, expected: np.ndarray[Any, Any]) -> None:
    import tritonclient.http as triton

    text = triton.InferInput("TEXT", [3, 1], "BYTES")
    text.set_data_from_numpy(np.array([[TEXTS[0].encode()], [b"ab\xff"], [TEXTS[1].encode()]], np.object_))
    with triton.InferenceServerClient(server.urls.http.removeprefix("http://")) as client:
        answer = client.infer("tiny", [text])
    np.testing.assert_array_equal(answer.as_numpy("SCORES")[[0, 2]], expected[:2])
    assert (answer.as_numpy("SCORES")[1] == 0).all()
    assert answer.as_numpy("LABEL")[1] == b""
    assert list(answer.as_numpy("TOP_LABELS")[1]) == [b""] * 3
    assert [bool(error) for error in answer.as_numpy("ERROR").reshape(-1)] == [False, True, False]
    assert b"byte 0xff at position 2" in answer.as_numpy("ERROR")[1, 0]


def test_predict_rows_reports_bad_rows_beside_good_ones(server: TritonServer) -> None:
    client = ServedClassifier("tiny", server.urls.http)
    too_long = "x" * 1_000_001
    assert [bool(row.error) for row in client.predict_rows(["w1", too_long, "w2 \ud800"])] == [False, True, False]
    assert all("1000001 characters" in row.error for row in client.predict_rows([too_long, too_long]))
    with pytest.raises(RequestError, match="text 1: "):
        client.scores(["w1", too_long])
    client.close()


def test_top_k_labels_come_best_first(server: TritonServer, expected: np.ndarray[Any, Any]) -> None:
    status, answer = post(server, body(TEXTS[:2], parameters={"top_k": 2}))
    assert status == 200
    best = -np.sort(-expected[:2], axis=1)[:, :2]
    np.testing.assert_array_equal(np.float32(outputs(answer)["TOP_SCORES"]).reshape(2, 2), best)
    assert outputs(answer)["TOP_LABELS"][::2] == outputs(answer)["LABEL"]
    assert len(outputs(post(server, body(TEXTS[:1], parameters={"top_k": 9}))[1])["TOP_LABELS"]) == 3, (
        "there are no more"
    )
    wanted = body(TEXTS[:1], outputs=[{"name": "LABEL"}])
    assert list(outputs(post(server, wanted)[1])) == ["LABEL"]


def test_a_client_that_disconnects_does_not_disturb_others(server: TritonServer) -> None:
    host, port = server.urls.http.removeprefix("http://").split(":")
    content = json.dumps(body(LONG)).encode()
    head = f"POST /v2/models/tiny/infer HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n\r\n".encode()
    for sent in (head + content[:1000], head + content):
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(sent)
    assert post(server, body(["w1"]))[0] == 200


def test_a_full_queue_refuses_some_and_answers_the_others_right(
    server: TritonServer, expected: np.ndarray[Any, Any]
) -> None:
    def ask(i: int) -> tuple[int, Any]:
        return post(server, body(LONG[:16] if i % 4 == 0 else [TEXTS[i]]), "short-queue")

    with ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(ask, range(64)))
    assert {status for status, _ in answers} == {200, 503}
    for i, (status, answer) in enumerate(answers):
        if status == 503:
            assert "queue" in answer["error"]
        elif i % 4:
            np.testing.assert_array_equal(np.float32(outputs(answer)["SCORES"]), expected[i])


def test_our_client_waits_for_a_full_queue(server: TritonServer, expected: np.ndarray[Any, Any]) -> None:
    client = ServedClassifier("short-queue", server.urls.http, in_flight=16)
    client.max_batch_size = 1
    np.testing.assert_array_equal(client.scores(TEXTS), expected)
    client.close()


def test_200_concurrent_mixed_requests_are_answered_right(server: TritonServer, expected: np.ndarray[Any, Any]) -> None:
    def ask(i: int) -> tuple[int, Any]:
        kind = i % 10
        if kind == 0:
            return post(server, body(["x" * 1_000_001]))
        if kind == 1:
            return post(server, body(TEXTS[i : i + 1], parameters={"top_k": -9}))
        return post(server, body(TEXTS[i : i + 1 + kind]))

    with ThreadPoolExecutor(40) as pool:
        answers = list(pool.map(ask, range(200)))
    for i, (status, answer) in enumerate(answers):
        if i % 10 < 2:
            assert status == 400
        else:
            rows = expected[i : i + 1 + i % 10]
            np.testing.assert_array_equal(np.float32(outputs(answer)["SCORES"]).reshape(rows.shape), rows)


def test_requests_of_one_text_get_their_own_label_scores_and_error(
    server: TritonServer, tiny_export: Path, expected: np.ndarray[Any, Any]
) -> None:
    """Their answers share tensors with earlier answers, and those of one batch with each other."""
    labels = load_manifest(tiny_export).task.decide(expected)
    outputs_asked = [{"name": name} for name in ("LABEL", "SCORES", "ERROR")]
    with ThreadPoolExecutor(32) as pool:
        for _ in range(5):
            asked = [body([text], outputs=outputs_asked) for text in TEXTS]
            for i, (status, answer) in enumerate(pool.map(lambda content: post(server, content), asked)):
                assert status == 200
                assert outputs(answer)["LABEL"] == [labels[i]]
                assert outputs(answer)["ERROR"] == [""]
                np.testing.assert_array_equal(np.float32(outputs(answer)["SCORES"]), expected[i])


def test_only_the_supervisor_may_unload_models(server: TritonServer) -> None:
    connection = http.client.HTTPConnection(server.urls.http.removeprefix("http://"))
    for path in ("/v2/repository/models/tiny/unload", "/v2/repository/index", "/v2/systemsharedmemory/status"):
        connection.request("GET" if path.endswith("status") else "POST", path, b"")
        response = connection.getresponse()
        response.read()
        assert response.status == 403
    connection.close()
    assert post(server, body(["w1"]))[0] == 200


@pytest.mark.parametrize(
    ("url", "message"),
    [("ftp://here", "HTTP address"), ("http://", "HTTP address"), ("here:99999", "Port"), ("a b", "HTTP address")],
)
def test_a_bad_url_is_a_usage_error(url: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_url(url)


def test_urls_with_and_without_scheme_are_the_same() -> None:
    assert parse_url("127.0.0.1:8000") == parse_url("http://127.0.0.1:8000/") == ("127.0.0.1:8000", False)
    assert parse_url("somewhere") == ("somewhere:8000", False)
    assert parse_url("https://gateway/triton") == ("gateway:443/triton", True)


def test_no_server_and_a_wrong_port_have_different_errors(server: TritonServer) -> None:
    with pytest.raises(ServerError, match=r"no server answers at 127\.0\.0\.1:9"):
        ServedClassifier("tiny", "127.0.0.1:9")
    for port in (server.urls.grpc, server.urls.metrics.removesuffix("/metrics")):
        with pytest.raises(ServerError, match="is not a Triton server"):
            ServedClassifier("tiny", port)


# Operators


def test_models_notes_urls_and_memory_are_reported(server: TritonServer) -> None:
    assert server.models == ("short-queue", "tiny")
    assert server.notes == ["model unpackaged: skipped, it has no version yet; run deploykit package"]
    assert 20 < server.memory_mb() < 2000


def test_a_killed_stub_is_replaced_and_requests_are_answered_again(
    own_repository: Path, expected: np.ndarray[Any, Any]
) -> None:
    with start(own_repository) as server:
        client = ServedClassifier("tiny", server.urls.http)
        with supervised(server):
            for stub in family(server)[1:]:
                stub.kill()
            started = time.monotonic()
            np.testing.assert_array_equal(client.scores(TEXTS), expected)
            assert time.monotonic() - started < 10
        client.close()


def test_stop_finishes_requests_and_leaves_nothing_behind(own_repository: Path) -> None:
    with start(own_repository) as server:
        processes = family(server)
        assert len(processes) == 3, "the server and two instances"
        folder, prefix = server._folder, server._shm_prefix
        assert folder is not None
        assert list(Path("/dev/shm").glob(f"{prefix}*"))
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(post, server, body(LONG))
            time.sleep(0.3)
            server.stop()
            assert answer.result()[0] == 200
    assert all(gone(process) for process in processes)
    assert not folder.exists()
    assert not list(Path("/dev/shm").glob(f"{prefix}*"))


def test_a_request_that_the_engine_fails_on_fails_alone_and_without_a_traceback(
    tiny_export: Path, own_repository: Path, expected: np.ndarray[Any, Any]
) -> None:
    import onnx
    from onnx import numpy_helper

    version = own_repository / "tiny" / "1"
    graph = onnx.load(str(version / "model.onnx"))
    [embeddings] = [tensor for tensor in graph.graph.initializer if tensor.name == "embeddings"]
    embeddings.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(embeddings)[:-1], "embeddings"))
    onnx.save(graph, str(version / "model.onnx"))
    manifest = load_manifest(version, verify=False)
    write_manifest(version, "model", manifest.task, inputs="", options=manifest.options)
    with start(own_repository) as server, ThreadPoolExecutor(16) as pool:
        texts = ["w199" if i % 8 == 0 else TEXTS[i % 7] for i in range(64)]
        answers = list(pool.map(lambda text: post(server, body([text])), texts))
    for i, (status, answer) in enumerate(answers):
        if i % 8 == 0:
            assert status == 500
            assert "the model failed on this request" in answer["error"]
            assert "/" not in answer["error"]
        else:
            np.testing.assert_array_equal(np.float32(outputs(answer)["SCORES"]), expected[i % 7])


def _failed(server: TritonServer) -> float:
    text = urllib.request.urlopen(server.urls.metrics, timeout=10).read().decode()
    found = re.findall(r'^nv_inference_request_failure\{model="tiny",.*\} (.*)$', text, re.MULTILINE)
    return sum(map(float, found))


def test_a_cancelled_request_is_not_run(server: TritonServer) -> None:
    import tritonclient.grpc as triton
    from tritonclient.utils import InferenceServerException

    text = triton.InferInput("TEXT", [64, 1], "BYTES")
    text.set_data_from_numpy(np.array(LONG, np.object_).reshape(-1, 1))
    failures: list[InferenceServerException] = []
    before = _failed(server)
    with triton.InferenceServerClient(server.urls.grpc) as client:
        calls = [client.async_infer("tiny", [text], lambda result, error: failures.append(error)) for _ in range(8)]
        time.sleep(0.3)
        for call in calls:
            call.cancel()
        assert wait_until(lambda: len(failures) == 8, 30)
    assert any("ancel" in str(failure) for failure in failures)
    assert wait_until(lambda: _failed(server) > before, 30)
    assert wait_until(lambda: post(server, body(["w1"]))[0] == 200, 30), "those that ran may outlast one queue timeout"


def test_a_start_removes_only_what_a_dead_server_left(own_repository: Path, tmp_path: Path) -> None:
    """The server whose folder is locked runs; links, and folders of other names, are not followed or removed."""
    temporary, kept = tmp_path / "temporary", tmp_path / "kept"
    for folder in (temporary / "deploykit-serve-dead", temporary / "deploykit-serve-runs", temporary / "other", kept):
        folder.mkdir(parents=True)
        (folder / "file").touch()
    (temporary / "deploykit-serve-dead" / "link").symlink_to(kept)
    (temporary / "deploykit-serve-link").symlink_to(kept)
    pipe = Path("/dev/shm/deploykit_0_0_owner")
    os.mkfifo(pipe)
    locked = os.open(temporary / "deploykit-serve-runs", os.O_RDONLY)
    assert lock(locked, wait=False)
    with patch("tempfile.tempdir", str(temporary)), start(own_repository) as server:
        assert server._folder is not None
        left = {"deploykit-serve-runs", "deploykit-serve-link", "other"}
        assert {path.name for path in temporary.iterdir()} == {*left, server._folder.name}
    os.close(locked)
    assert not pipe.exists()
    assert {path.name for path in temporary.iterdir()} == left
    assert [(temporary / name / "file").exists() for name in sorted(left)] == [True, True, True]


def test_a_closed_terminal_ends_serve_as_ctrl_c_does(own_repository: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "deploykit", "serve", "--model-repository", str(own_repository)]
    command += [word for name in ("http", "grpc", "metrics") for word in (f"--{name}-port", "0")]
    command += ["--ready-file", str(tmp_path / "ready.json")]
    (tmp_path / "temporary").mkdir()
    main, terminal = os.openpty()
    run = subprocess.Popen(
        ["setsid", "--ctty", "--wait", *command],
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        env={**os.environ, "TMPDIR": str(tmp_path / "temporary")},
    )
    os.close(terminal)
    assert wait_until((tmp_path / "ready.json").exists, 60)
    os.close(main)
    run.wait(60)
    assert not list((tmp_path / "temporary").glob("deploykit-*"))
    assert not (tmp_path / "ready.json").exists()


def test_stop_does_not_wait_for_idle_connections(own_repository: Path) -> None:
    with start(own_repository) as server:
        client = ServedClassifier("tiny", server.urls.http)
        client.scores(["w1"])
        started = time.monotonic()
        server.stop()
        assert time.monotonic() - started < 10
    client.close()


def test_the_server_ends_when_its_starter_is_killed(own_repository: Path) -> None:
    code = f"""
from pathlib import Path
from deploykit.triton.server import TritonServer
server = TritonServer(Path({str(own_repository)!r}), http_port=0, grpc_port=0, metrics_port=0)
server.start()
print(server.pid, server._folder, flush=True)
input()
"""
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as starter:
        assert starter.stdout is not None
        pid, folder = starter.stdout.readline().split()
        server = psutil.Process(int(pid))
        processes = [server, *server.children()]
        starter.kill()
    shutil.rmtree(folder)
    assert wait_until(lambda: all(gone(process) for process in processes), 15)


def test_a_busy_port_is_named(own_repository: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(ServerError, match=f"grpc port {port} on 127.0.0.1 is in use") as caught:
            start(own_repository, grpc_port=port).start()
    assert "--grpc-port" in (caught.value.remedy or "")


def test_a_flipped_bit_is_found_before_launch(own_repository: Path) -> None:
    graph = own_repository / "tiny" / "1" / "model.onnx"
    content = bytearray(graph.read_bytes())
    content[500] ^= 1
    graph.write_bytes(content)
    with pytest.raises(CorruptArtifactError, match=re.escape(str(graph))):
        start(own_repository).start()


def test_a_graph_that_does_not_load_is_reported_with_our_message_only(own_repository: Path) -> None:
    version = own_repository / "tiny" / "1"
    manifest = load_manifest(version)
    (version / "model.onnx").write_bytes(b"not a graph")
    write_manifest(version, "model", manifest.task, inputs="", options=manifest.options)
    with pytest.raises(ServerError) as caught:
        start(own_repository).start()
    assert caught.value.message.startswith(f"model tiny cannot be loaded: {version}/model.onnx: ONNX Runtime")
    assert caught.value.remedy == "export the model again"
    assert "model.py" not in str(caught.value)


def test_no_model_and_no_repository_are_errors(own_repository: Path, tmp_path: Path) -> None:
    shutil.rmtree(own_repository / "tiny" / "1")
    with pytest.raises(ServerError, match=r"no model to serve\n.*tiny: skipped"):
        start(own_repository).start()
    with pytest.raises(ArtifactError, match="no such directory"):
        start(tmp_path / "nowhere").start()


def test_a_server_that_is_not_ready_in_time_is_stopped(own_repository: Path) -> None:
    server = start(own_repository, ready_timeout=0.01)
    with pytest.raises(ServerError, match=r"not ready within 0\.01 s"):
        server.start()
    assert not [p for p in psutil.process_iter() if server._shm_prefix in " ".join(_command(p))]


def _command(process: psutil.Process) -> list[str]:
    try:
        return list(process.cmdline())
    except psutil.Error:
        return []


@pytest.mark.parametrize(
    ("fake", "message", "remedy"),
    [
        ("pytriton", "nvidia-pytriton", "pip install 'deploykit[serve]'"),
        ("numpy", "numpy 2.4.0", "pip install 'numpy<2'"),
        ("stub", "no stub for Python 9.9", "use Python 3.10 to 3.12"),
        (
            "libpython",
            r"libpython3\.\d+\.so\.1\.0, which the server.s Python processes need, is not installed",
            "apt-get install libpython3.",
        ),
        ("library", "libz.so.1", "install the system packages"),
    ],
)
def test_a_missing_piece_is_named_with_its_remedy(
    own_repository: Path, monkeypatch: pytest.MonkeyPatch, fake: str, message: str, remedy: str
) -> None:
    libpython = f"libpython3.{sys.version_info.minor}.so.1.0"
    if fake == "pytriton":
        find_spec = importlib.util.find_spec
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == fake else find_spec(name))
    elif fake == "numpy":
        monkeypatch.setattr(preflight.importlib.metadata, "version", lambda name: "2.4.0")
    elif fake == "stub":
        monkeypatch.setattr(preflight.sys, "version_info", type("Version", (), {"major": 9, "minor": 9}))
    else:
        missing = {libpython if fake == "libpython" else "libz.so.1"}
        monkeypatch.setattr(preflight, "linked_libraries", lambda binary, folders: dict.fromkeys(missing))
        monkeypatch.setattr(preflight.sysconfig, "get_config_var", lambda name: None)
    with pytest.raises(MissingDependencyError, match=message) as caught:
        start(own_repository).start()
    assert remedy in (caught.value.remedy or "")


def test_libraries_are_those_of_the_dynamic_linker() -> None:
    triton = preflight.find_triton()
    linked = preflight.linked_libraries(triton.stub, triton.library_path.split(":"))
    assert None not in linked.values()
    libpython = f"libpython3.{sys.version_info.minor}.so.1.0"
    own = Path(sysconfig.get_config_var("LIBDIR"), libpython)
    assert not own.is_file() or linked[libpython] == own.resolve()
    assert None not in preflight.linked_libraries(Path("/bin/sh"), []).values()


def test_the_stub_takes_the_library_of_the_python_that_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system's may have the same name and another patch number."""
    libpython = f"libpython3.{sys.version_info.minor}.so.1.0"
    found = preflight.linked_libraries(preflight.find_triton().stub, preflight.find_triton().library_path.split(":"))
    shutil.copy(str(found[libpython]), tmp_path / libpython)
    monkeypatch.setattr(preflight.sysconfig, "get_config_var", lambda name: str(tmp_path))
    triton = preflight.find_triton()
    assert preflight.linked_libraries(triton.stub, triton.library_path.split(":"))[libpython] == tmp_path / libpython


def test_the_backend_needs_neither_torch_nor_transformers() -> None:
    modules = "deploykit.tasks.classification.predictor, deploykit.runtime.engines.onnxruntime, deploykit.artifacts"
    code = f"import sys, {modules}, deploykit.tasks.opening; print({{'torch', 'transformers'}} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


# Packaging


def test_packaging_again_reuses_and_a_new_export_adds_a_version(
    own_repository: Path, make_tiny_export: Callable[..., Path], tiny_export: Path, tmp_path: Path
) -> None:
    again = package(tiny_export, "tiny", own_repository, engine="onnxruntime", precision="fp32")
    assert (again.version, again.reused) == (1, True)
    before = digest_path(own_repository / "tiny" / "1")
    config = (own_repository / "tiny" / "config.pbtxt").read_text()

    other = make_tiny_export(tmp_path / "other", seed=1)
    second = package(other, "tiny", own_repository, engine="onnxruntime", precision="fp32")

    assert (second.version, second.reused, second.config_kept) == (2, False, True)
    assert digest_path(own_repository / "tiny" / "1") == before
    assert (own_repository / "tiny" / "config.pbtxt").read_text() == config
    manifest = load_manifest(second.path, "model")
    assert manifest.parent == load_manifest(other).digest
    assert manifest.options == {"engine": "onnxruntime", "precision": "fp32", "name": "tiny"}
    assert sorted(manifest.files) == ["model.onnx", "tokenizer.json"]
    assert list_models(own_repository)[0].versions == (1, 2)


def test_other_labels_are_refused_unless_the_config_is_overwritten(
    own_repository: Path, make_tiny_export: Callable[..., Path], tmp_path: Path
) -> None:
    stars = make_tiny_export(tmp_path / "stars", labels=("1", "2", "3", "4", 'it\'s "5" \\ 五'))
    with pytest.raises(ArtifactError, match=r"parameter labels is .*negative") as caught:
        package(stars, "tiny", own_repository)
    assert "--overwrite-config" in (caught.value.remedy or "")
    assert list_models(own_repository)[0].versions == (1,)
    packaged = package(stars, "tiny", own_repository, engine="onnxruntime", overwrite_config=True)
    with start(own_repository) as server:
        client = ServedClassifier("tiny", server.urls.http)
        assert client.task == packaged.manifest.task
        client.close()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('backend: "deploykit"', 'backend: "python"', "backend is 'python'"),
        ("max_batch_size: 64", "max_batch_size: 0", "max_batch_size is 0"),
        ('name: "TEXT" data_type: TYPE_STRING', 'name: "TEXT" data_type: TYPE_INT64', "input TEXT is TYPE_INT64"),
        ("dims: [ 3 ]", "dims: [ 4 ]", "output SCORES is TYPE_FP32 \\[4\\]"),
        ('output { name: "ERROR" data_type: TYPE_STRING dims: [ 1 ] }', "", "lacks the output ERROR"),
        ('"multi_label": false', '"multi_label": true', "parameter task has multi_label true"),
        ("dynamic_batching {", "dynamic_baking {", "no field named .dynamic_baking"),
    ],
)
def test_a_config_that_does_not_fit_is_refused_by_field(
    own_repository: Path, tiny_export: Path, old: str, new: str, message: str
) -> None:
    config = own_repository / "tiny" / "config.pbtxt"
    text = config.read_text()
    assert old in text
    config.write_text(text.replace(old, new))
    with pytest.raises(ArtifactError, match=message):
        package(tiny_export, "tiny", own_repository)
    with pytest.raises(ArtifactError, match=message):
        start(own_repository).start()


@pytest.mark.parametrize("name", ["", ".", "..", ".hidden", "a/b", "a b", "../up", "tiny\n", "é"])
def test_a_name_that_is_no_folder_name_is_refused(tiny_export: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="is not allowed"):
        package(tiny_export, name, tmp_path)
    assert not list(tmp_path.iterdir())


def test_settings_appear_in_the_config(tiny_export: Path) -> None:
    settings = ServingSettings(8, 2, 3, 512, 100, 7, 5000)
    config = validate_config(config_text(load_manifest(tiny_export).task, settings))
    policy = config.dynamic_batching.default_queue_policy
    assert (config.max_batch_size, config.instance_group[0].count, policy.max_queue_size) == (8, 2, 7)
    assert (policy.default_timeout_microseconds, config.dynamic_batching.max_queue_delay_microseconds) == (5000, 100)
    assert (config.parameters["threads"].string_value, config.parameters["token_budget"].string_value) == ("3", "512")
    with pytest.raises(UsageError, match="instances is 0"):
        ServingSettings(instances=0)


def test_the_config_checked_in_is_what_package_writes_for_the_demo() -> None:
    from deploykit.tasks.registry import task_of_parameters
    from deploykit.triton.repository import check_config, read_config

    path = ROOT / "model_repository" / "sentiment" / "config.pbtxt"
    parameters = read_config(path).parameters
    task = task_of_parameters({key: parameters[key].string_value for key in ("labels", "task")})
    assert task.labels == ("negative", "neutral", "positive")
    check_config(path, task)


def test_a_config_of_an_earlier_version_fits_a_model_with_the_defaults(tmp_path: Path) -> None:
    from deploykit.tasks.registry import task_of_parameters
    from deploykit.triton.repository import check_config, read_config

    written = ROOT / "model_repository" / "sentiment" / "config.pbtxt"
    earlier = tmp_path / "sentiment" / "config.pbtxt"
    earlier.parent.mkdir()
    earlier.write_text(written.read_text().replace(', "regression": false', ""))
    assert "regression" not in earlier.read_text()
    parameters = read_config(written).parameters
    task = task_of_parameters({key: parameters[key].string_value for key in ("labels", "task")})
    check_config(earlier, task)
    with pytest.raises(ArtifactError, match="has regression false, the model true"):
        check_config(earlier, dataclasses.replace(task, regression=True))
