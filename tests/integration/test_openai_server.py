"""``deploykit serve --openai-port`` on a real Triton: its address, keys, classifier, crash and end."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import signal
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import psutil
import pytest
import tritonclient.http as triton
from certificates import certificate
from served import body, wait_until

from deploykit.errors import RequestError, ServerError
from deploykit.openai.limits import digest
from deploykit.tasks.opening import open_served
from deploykit.triton.repository import package

KEY, FEW = "a-key", "a-key-for-few"


@pytest.fixture(scope="module")
def repository(tiny_export: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    repository = tmp_path_factory.mktemp("repository")
    package(tiny_export, "tiny", repository, engine="onnxruntime", precision="fp32")
    return repository


def command(repository: Path, *options: str) -> list[str]:
    ports = ["--http-port", "0", "--grpc-port", "0", "--metrics-port", "0"]
    return [sys.executable, "-m", "deploykit", "serve", "--model-repository", str(repository), *ports, *options]


@pytest.fixture(scope="module")
def served(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """The ready file of a server with keys and TLS; in the end SIGTERM stops it. ``verify`` is its certificate."""
    folder = tmp_path_factory.mktemp("ready")
    ready, keys = folder / "ready.json", folder / "keys"
    keys.write_text(f"all:{digest(KEY)}\nfew:{digest(FEW)}:max_rows=2,max_body_bytes=4000\n")
    certfile, keyfile = certificate(folder)
    options = ("--openai-port", "0", "--api-key-file", str(keys), "--ready-file", str(ready), "--drain", "5", "--triton-routes",
               "--ssl-certfile", str(certfile), "--ssl-keyfile", str(keyfile))  # fmt: skip
    environment = {**os.environ, "DEPLOYKIT_API_KEY": "another"}
    process = subprocess.Popen(command(repository, *options), stderr=subprocess.PIPE, text=True, env=environment)
    try:
        assert wait_until(lambda: ready.exists() or process.poll() is not None, 90)
        assert ready.exists(), process.communicate()[1]
        yield {**json.loads(ready.read_text()), "certfile": str(certfile),
               "verify": ssl.create_default_context(cafile=certfile)}  # fmt: skip
        process.send_signal(signal.SIGTERM)
        _, printed = process.communicate(timeout=30)
        assert process.returncode == 0, printed
        assert "  OpenAI   https://127.0.0.1:" in printed
        assert "Traceback" not in printed
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def client(served: dict[str, Any]) -> Iterator[httpx.Client]:
    with asking(served, KEY) as client:
        yield client


def asking(served: dict[str, Any], key: str) -> httpx.Client:
    headers = {"authorization": f"Bearer {key}"}
    return httpx.Client(base_url=served["openai"], headers=headers, timeout=30, verify=served["verify"])


def test_the_openai_client_lists_the_models_with_the_key(served: dict[str, Any]) -> None:
    with asking(served, KEY) as http, openai.OpenAI(base_url=served["openai"], api_key=KEY, http_client=http) as client:
        assert sorted(model.id for model in client.models.list()) == ["tiny"]
        with pytest.raises(openai.AuthenticationError):
            client.with_options(api_key="wrong").models.list()


def test_texts_are_classified(client: httpx.Client) -> None:
    classified = client.post("/classify", json={"model": "tiny", "input": ["w1 w2", "w3"]}).json()["data"]
    assert {row["label"] for row in classified} <= {"negative", "neutral", "positive"}
    assert all(0 < row["score"] <= 1 for row in classified)


def test_health_and_metrics_are_tritons(served: dict[str, Any], client: httpx.Client) -> None:
    root = served["openai"].removesuffix("/v1")
    assert httpx.get(f"{root}/health", verify=served["verify"]).status_code == 200
    assert "nv_inference_request_success" in client.get(f"{root}/metrics").text


# Triton's API on the same port


def stubs_of(served: dict[str, Any]) -> list[psutil.Process]:
    found = []
    for process in psutil.Process(served["pid"]).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if any("/tiny/" in word for word in process.cmdline()):
                found.append(process)
    return found


def infer(client: httpx.Client, content: Any, **options: Any) -> httpx.Response:
    root = str(client.base_url).removesuffix("/v1/")
    return client.post(f"{root}/v2/models/tiny/infer", content=json.dumps(content) if isinstance(content, dict) else content, **options)  # fmt: skip


def test_tritons_own_ports_and_the_front_give_the_same_answers(served: dict[str, Any], client: httpx.Client) -> None:
    root = served["openai"].removesuffix("/v1")
    content = body(["w1 w2", "w3"])
    answer = infer(client, content)
    assert answer.status_code == 200
    assert answer.json() == httpx.post(f"{served['http']}/v2/models/tiny/infer", json=content).json()
    for route in (
        "/v2",
        "/v2/health/ready",
        "/v2/models/tiny",
        "/v2/models/tiny/config",
        "/v2/models/tiny/versions/1/ready",
    ):
        answer, own = client.get(f"{root}{route}"), httpx.get(f"{served['http']}{route}")
        assert (answer.status_code, answer.content) == (200, own.content), route
    assert client.get(f"{root}/v2/models/tiny/stats").json()["model_stats"][0]["name"] == "tiny"


def test_tritonclient_asks_in_binary_with_tls_and_key(served: dict[str, Any]) -> None:
    address = served["openai"].removesuffix("/v1").removeprefix("https://")
    client = triton.InferenceServerClient(address, ssl=True, ssl_context_factory=lambda: served["verify"])
    text = triton.InferInput("TEXT", [2, 1], "BYTES")
    text.set_data_from_numpy(np.array([[b"w1 w2"], [b"w3"]], np.object_))
    with contextlib.closing(client):
        answer = client.infer(
            "tiny", [text], headers={"authorization": f"Bearer {KEY}"}, response_compression_algorithm="gzip"
        )
        assert answer.as_numpy("SCORES").shape == (2, 3)
        with pytest.raises(triton.InferenceServerException, match="give a valid API key"):
            client.infer("tiny", [text])


def test_deploykits_own_client_asks_with_tls_and_key(served: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    url = served["openai"].removesuffix("/v1")
    monkeypatch.setenv("SSL_CERT_FILE", served["certfile"])
    monkeypatch.setenv("DEPLOYKIT_API_KEY", KEY)
    with contextlib.closing(open_served("tiny", url)) as model:
        assert model.scores(["w1 w2"]).shape == (1, 3)
    monkeypatch.delenv("DEPLOYKIT_API_KEY")
    with pytest.raises(RequestError, match="needs an API key"):
        open_served("tiny", url)
    monkeypatch.delenv("SSL_CERT_FILE")
    with pytest.raises(ServerError, match="its certificate is not trusted") as refused:
        open_served("tiny", url)
    assert "SSL_CERT_FILE" in str(refused.value.remedy)


def test_tritons_processes_do_not_have_the_keys(served: dict[str, Any]) -> None:
    processes = [psutil.Process(served["pid"]), *psutil.Process(served["pid"]).children(recursive=True)]
    assert len(processes) > 1
    assert all("DEPLOYKIT_API_KEY" not in process.environ() for process in processes)


def test_a_key_is_held_to_its_limits_on_tritons_routes(served: dict[str, Any]) -> None:
    def refusal(content: Any, **options: Any) -> tuple[int, str]:
        answer = infer(client, content, **options)
        assert list(answer.json()) == ["error"]
        return answer.status_code, answer.json()["error"]

    with asking(served, FEW) as client:
        assert infer(client, body(["w1", "w2"])).status_code == 200
        assert refusal(body(["w1", "w2", "w3"])) == (400, "inputs: the request asks for 3 answers; your limit is 2")
        assert refusal(body(["w1" * 3000])) == (413, "the body has more than 4,000 bytes")
        twice = json.dumps(body(["w1", "w2", "w3"]))[:-1] + f', "inputs": {json.dumps(body(["w1"])["inputs"])}}}'
        status, told = refusal(twice)
        assert (status, "a name occurs twice" in told) == (400, True)
        assert refusal(b"x", headers={"inference-header-content-length": "9"})[0] == 400
        assert refusal(gzip.compress(b"{}"), headers={"content-encoding": "gzip"})[0] == 415


@pytest.mark.parametrize(
    ("method", "route"),
    [
        ("POST", "/v2/repository/index"),
        ("POST", "/v2/repository/models/tiny/unload"),
        ("POST", "/v2/systemsharedmemory/region/x/register"),
        ("GET", "/v2/systemsharedmemory/status"),
        ("POST", "/v2/logging"),
        ("GET", "/v2/models/tiny/trace/setting"),
        ("GET", "/v2/models/..%2frepository"),
        ("POST", "/v2/models/other/infer"),
        ("GET", "/v2/trace/setting"),
    ],
)
def test_other_routes_of_triton_are_closed(
    served: dict[str, Any], client: httpx.Client, method: str, route: str
) -> None:
    answer = client.request(
        method, f"{served['openai'].removesuffix('/v1')}{route}", content=b"{}" if method == "POST" else None
    )
    assert (answer.status_code, list(answer.json())) == (404, ["error"])


def test_no_client_of_tritons_routes_sees_a_model_process_die(served: dict[str, Any]) -> None:
    stop = threading.Event()

    def ask(_: int) -> list[int]:
        statuses = []
        with asking(served, KEY) as client:
            while not stop.is_set():
                answer = infer(client, body(["w1 w2"]))
                statuses.append(answer.status_code)
        return statuses

    with ThreadPoolExecutor(64) as clients:
        asked = clients.map(ask, range(64))
        try:
            first, *others = stubs_of(served)
            assert others
            time.sleep(1.0)
            first.kill()
            assert wait_until(lambda: len({*stubs_of(served)} - {first, *others}) == 2, 30)
        finally:
            stop.set()
        statuses = [status for of_client in asked for status in of_client]
    assert len(statuses) > 64
    assert set(statuses) == {200}


def test_a_model_whose_process_is_killed_answers_again(served: dict[str, Any], client: httpx.Client) -> None:
    body = {"model": "tiny", "input": "w1 w2"}
    before = client.post("/classify", json=body).json()["data"]
    stubs = stubs_of(served)
    for stub in stubs:
        stub.kill()
    assert stubs
    assert wait_until(lambda: client.post("/classify", json=body).status_code == 200, 20)
    assert client.post("/classify", json=body).json()["data"] == before


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--api-key", "x"), "--api-key is for the OpenAI port"),
        (("--triton-routes",), "--triton-routes is for the OpenAI port"),
        (("--openai-port", "0", "--ssl-certfile", "x"), "--ssl-certfile and --ssl-keyfile go together"),
        (("--openai-port", "0", "--access-log-texts"), "--access-log-texts is for the access log"),
        (("--openai-port", "0", "--limits", "rows=1"), "'rows' is not a limit"),
        (("--openai-port", "0", "--api-key", ""), "an API key is empty"),
        (("--openai-port", "0", "--host", "no.such.host.invalid"), "is not an IPv4 address or host name"),
    ],
)
def test_options_that_do_not_fit_are_refused(repository: Path, options: tuple[str, ...], told: str) -> None:
    done = subprocess.run(command(repository, *options), capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert told in done.stderr


def test_a_port_in_use_is_named(repository: Path, served: dict[str, Any]) -> None:
    port = served["openai"].removesuffix("/v1").rpartition(":")[2]
    done = subprocess.run(command(repository, "--openai-port", port), capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert f"openai port {port} on 127.0.0.1 is in use" in done.stderr
    assert "--openai-port" in done.stderr
