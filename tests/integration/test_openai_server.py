"""``deploykit serve --openai-port`` on a real Triton: its address, keys, classifier, crash and end."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
from served import wait_until

from deploykit.triton.repository import package

KEY = "a-key"


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
    """What the ready file says of a server with a key; in the end SIGTERM stops it."""
    ready = tmp_path_factory.mktemp("ready") / "ready.json"
    options = ("--openai-port", "0", "--api-key", KEY, "--ready-file", str(ready), "--drain", "5")
    process = subprocess.Popen(command(repository, *options), stderr=subprocess.PIPE, text=True)
    try:
        assert wait_until(lambda: ready.exists() or process.poll() is not None, 90)
        assert ready.exists(), process.communicate()[1]
        yield json.loads(ready.read_text())
        process.send_signal(signal.SIGTERM)
        _, printed = process.communicate(timeout=30)
        assert process.returncode == 0, printed
        assert "  OpenAI   http://127.0.0.1:" in printed
        assert "Traceback" not in printed
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def client(served: dict[str, Any]) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=served["openai"], headers={"authorization": f"Bearer {KEY}"}, timeout=30) as client:
        yield client


def test_the_openai_client_lists_the_models_with_the_key(served: dict[str, Any]) -> None:
    with openai.OpenAI(base_url=served["openai"], api_key=KEY) as client:
        assert sorted(model.id for model in client.models.list()) == ["tiny"]
    with openai.OpenAI(base_url=served["openai"], api_key="wrong") as client, pytest.raises(openai.AuthenticationError):
        client.models.list()


def test_texts_are_classified(client: httpx.Client) -> None:
    classified = client.post("/classify", json={"model": "tiny", "input": ["w1 w2", "w3"]}).json()["data"]
    assert {row["label"] for row in classified} <= {"negative", "neutral", "positive"}
    assert all(0 < row["score"] <= 1 for row in classified)


def test_health_and_metrics_are_tritons(served: dict[str, Any], client: httpx.Client) -> None:
    root = served["openai"].removesuffix("/v1")
    assert httpx.get(f"{root}/health").status_code == 200
    assert "nv_inference_request_success" in client.get(f"{root}/metrics").text


def test_a_model_whose_process_is_killed_answers_again(served: dict[str, Any], client: httpx.Client) -> None:
    body = {"model": "tiny", "input": "w1 w2"}
    before = client.post("/classify", json=body).json()["data"]
    stubs = [
        p for p in psutil.Process(served["pid"]).children(recursive=True) if any("/tiny/" in a for a in p.cmdline())
    ]
    for stub in stubs:
        stub.kill()
    assert stubs
    assert wait_until(lambda: client.post("/classify", json=body).status_code == 200, 20)
    assert client.post("/classify", json=body).json()["data"] == before


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--api-key", "x"), "--api-key is for the OpenAI port"),
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
