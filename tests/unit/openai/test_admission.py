"""Keys, limits and TLS of the OpenAI port, over real sockets."""

from __future__ import annotations

import gc
import json
import os
import socket
import ssl
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from certificates import certificate
from fake_generator import BREAKS, ENDLESS, HANGS, TOO_LONG
from fake_triton import FakeTriton
from openai_service import Service, serve
from served import wait_until

from deploykit.errors import DataError, UsageError
from deploykit.openai import read_body
from deploykit.openai import server as openai_server
from deploykit.openai.calls import AccessLog
from deploykit.openai.certificate import Certificate
from deploykit.openai.limits import Keys, Limits, digest
from deploykit.openai.metrics import PortMetrics
from deploykit.triton.load import parse


def line(name: str, key: str, limits: str = "") -> str:
    return f"{name}:{digest(key)}{':' + limits if limits else ''}\n"


def ask(url: str, route: str, key: str, **body: Any) -> httpx.Response:
    return httpx.post(f"{url}{route}", json=body, headers={"authorization": f"Bearer {key}"}, timeout=20)


# Keys


def test_every_route_but_health_needs_a_key() -> None:
    with FakeTriton() as triton, serve(triton, keys=Keys(["first", "second"])) as server:
        root = server.url.removesuffix("/v1")
        with httpx.Client(base_url=root) as client:
            assert client.get("/health").status_code == 200
            for headers in (
                {},
                {"authorization": "Bearer wrong"},
                {"authorization": "first"},
                {"authorization": b"Bearer \xff"},
            ):
                for method, route in (
                    ("GET", "/v1/models"),
                    ("GET", "/metrics"),
                    ("POST", "/v1/chat/completions"),
                    ("GET", "/no"),
                ):
                    answer = client.request(method, route, headers=headers)  # type: ignore[arg-type]
                    assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
            for key in ("first", "second"):
                assert client.get("/v1/models", headers={"authorization": f"bearer {key}"}).status_code == 200


def test_a_key_file_is_read_again_and_a_broken_one_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text(f"# who\n\n{line('alice', 'a', 'max_rows=3')}")
    keys = Keys([], path, Limits(max_tokens=7))
    alice = keys.caller(b"a")
    assert alice is not None
    assert (alice.name, alice.limits) == ("alice", Limits(max_tokens=7, max_rows=3))
    assert keys.caller(b"b") is None

    path.write_text(line("bob", "b"))
    os.utime(path, ns=(1, 1))
    assert (keys.caller(b"a"), keys.caller(b"b") is not None) == (None, True)

    path.write_text("bob:12\n")
    os.utime(path, ns=(2, 2))
    assert keys.caller(b"b") is not None
    path.unlink()
    assert keys.caller(b"b") is not None

    path.write_text("")
    assert keys.caller(b"b") is None


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("alice\n", "line 1: is not NAME:SHA256"),
        ("alice:secret\n", "line 1: is not NAME:SHA256"),
        (line("a b", "k"), "line 1: is not NAME:SHA256"),
        (line("a", "k") + line("a", "l"), "line 2: the key or the name occurs twice"),
        (line("a", "k") + line("b", "k"), "line 2: the key or the name occurs twice"),
        (line("a", "k", "max_row=1"), "line 1: 'max_row' is not a limit"),
        (line("a", "k", "timeout=nan"), "line 1: the limit timeout is 'nan'"),
        (line("a", "k", "max_rows=0"), "line 1: the limit max_rows is '0'"),
        (line("a", "k", "max_body_bytes=9999999999"), "line 1: the limit max_body_bytes"),
        ("# none\n", "has no key"),
    ],
)
def test_a_broken_key_file_is_refused_by_line(tmp_path: Path, content: str, told: str) -> None:
    path = tmp_path / "keys"
    path.write_text(content)
    with pytest.raises(DataError, match=told):
        Keys([], path)


# Limits


def test_a_key_is_held_to_its_limits_of_size_rows_and_tokens(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text(line("small", "s", "max_body_bytes=2000,max_rows=2,max_tokens=3") + line("large", "l"))
    with FakeTriton() as triton, serve(triton, keys=Keys([], path)) as server:

        def refused(route: str, **body: Any) -> tuple[int, Any, Any]:
            assert ask(server.url, route, "l", **body).status_code == 200
            answer = ask(server.url, route, "s", **body)
            error = answer.json()["error"]
            return answer.status_code, error["param"], error["code"]

        assert refused("/classify", model="tweets", input=["x" * 3000]) == (413, None, "body_too_large")
        assert refused("/classify", model="tweets", input=["a", "b", "c"]) == (400, "input", "too_many_rows")
        assert refused("/completions", model="writer", prompt=["a", "b"], n=2) == (400, "prompt", "too_many_rows")
        chat = {"model": "writer", "messages": [{"role": "user", "content": "Hi"}]}
        assert refused("/chat/completions", n=3, **chat) == (400, "n", "too_many_rows")
        assert refused("/chat/completions", max_completion_tokens=4, **chat) == (400, "max_tokens", "too_many_tokens")

        for tokens in ({}, {"max_tokens": 2}):
            assert ask(server.url, "/completions", "s", model="writer", prompt="a", **tokens).status_code == 200
        assert [asked.sampling["max_new_tokens"] for asked in triton.model.asked[-2:]] == [3, 2]


def test_requests_over_the_time_limit_get_504_and_streams_end_with_an_error() -> None:
    with FakeTriton() as triton, serve(triton, keys=Keys(limits=Limits(timeout=0.5))) as server:
        answer = ask(server.url, "/completions", "none", model="writer", prompt=HANGS)
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "timeout")
        answer = ask(server.url, "/completions", "none", model="writer", prompt=ENDLESS, stream=True)
        events = [part.removeprefix("data: ") for part in answer.text.split("\n\n") if part]
        assert answer.status_code == 200
        assert json.loads(events[0])["choices"]
        assert json.loads(events[-1])["error"]["code"] == "timeout"
        assert wait_until(lambda: triton.model.running == 0, 5)


def test_more_open_requests_than_the_limit_are_429_for_this_key_alone(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text(line("one", "1", "max_concurrent=1") + line("two", "2", "max_concurrent=1"))
    with (
        FakeTriton() as triton,
        serve(triton, keys=Keys([], path)) as server,
        ThreadPoolExecutor(1) as pool,
        httpx.Client(base_url=server.url, headers={"authorization": "Bearer 1"}) as client,
    ):
        with client.stream("POST", "/completions", json={"model": "writer", "prompt": ENDLESS, "stream": True}) as open:
            lines = open.iter_lines()  # it closes the stream when it is collected
            next(lines)
            second = pool.submit(ask, server.url, "/completions", "1", model="writer", prompt="a").result()
            assert (second.status_code, second.json()["error"]["code"]) == (429, "too_many_requests")
            assert second.headers["retry-after"] == "1"
            assert ask(server.url, "/completions", "2", model="writer", prompt="a").status_code == 200
        assert wait_until(
            lambda: ask(server.url, "/completions", "1", model="writer", prompt="a").status_code == 200, 5
        )


def test_a_body_that_comes_slowly_is_408(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read_body, "BODY_S", 0.3)
    address = urlsplit(service.url)
    assert address.hostname is not None
    with socket.create_connection((address.hostname, address.port or 0), timeout=10) as slow:
        slow.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{")
        answer = b""
        while part := slow.recv(4096):  # the server closes the connection
            answer += part
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b'"code":"timeout"' in answer


REQUEST = b'{"model": "writer", "prompt": "a"}'
LENGTH = len(REQUEST)


@pytest.mark.parametrize(
    ("headers", "content", "status"),
    [
        ([f"content-length: {LENGTH + 9}"], REQUEST, b"408"),
        ([f"content-length: {2**64 - 1}"], REQUEST, b"413"),
        ([f"content-length: {LENGTH - 9}"], REQUEST, b"400"),
        (["content-length: -5"], REQUEST, b"400"),
        (["content-length: ten"], REQUEST, b"400"),
        (["content-length: 1e3"], REQUEST, b"400"),
        (["content-length: "], REQUEST, b"400"),
        ([f"content-length: {10**30}"], REQUEST, b"400"),
        ([f"content-length: {LENGTH}", "content-length: 5"], REQUEST, b"400"),
        ([f"content-length: {LENGTH}", f"content-length: {LENGTH}"], REQUEST, b"200"),
        ([f"content-length: {LENGTH}", "transfer-encoding: chunked"], b"%x\r\n%s\r\n0\r\n\r\n" % (LENGTH, REQUEST), b"400"),
        (["transfer-encoding: chunked"], b"%x\r\n%s\r\n0\r\n\r\n" % (LENGTH, REQUEST), b"200"),
        (["transfer-encoding: chunked"], b"%x\r\n%s\r\n0\r\n\r\n" % (LENGTH - 9, REQUEST), b"400"),
        (["transfer-encoding: chunked"], b"-5\r\n%s\r\n0\r\n\r\n" % REQUEST, b"400"),
        (["transfer-encoding: chunked"], b"%x\r\n%s" % (LENGTH + 9, REQUEST), b"408"),
        (["transfer-encoding: chunked"], REQUEST, b"408"),
        (["transfer-encoding: gzip"], REQUEST, b"400"),
        ([], REQUEST, b"400"),
    ],
)  # fmt: skip
def test_a_body_of_another_length_than_said_is_refused_and_ends_the_connection(
    service: Service, monkeypatch: pytest.MonkeyPatch, headers: list[str], content: bytes, status: bytes
) -> None:
    monkeypatch.setattr(read_body, "BODY_S", 0.5)
    monkeypatch.setattr(openai_server, "_HEADER_S", 0.5)
    address = urlsplit(service.url)
    with socket.create_connection((address.hostname or "", address.port or 0), timeout=10) as client:
        client.sendall("\r\n".join(["POST /v1/completions HTTP/1.1", "host: x", *headers, "\r\n"]).encode() + content)
        answer = b""
        while part := client.recv(4096):  # the server closes the connection
            answer += part
    assert answer.split()[1] == status, answer
    assert status == b"200" or b'{"error":{"message":"' in answer


@pytest.mark.parametrize("sent", [b"", b"GET /health HT", b"GET /health HTTP/1.1\r\nhost: x\r\n\r\nGET /hea"])
def test_a_connection_without_a_whole_header_is_closed(monkeypatch: pytest.MonkeyPatch, sent: bytes) -> None:
    monkeypatch.setattr(openai_server, "_HEADER_S", 0.3)
    with FakeTriton() as triton, serve(triton) as server:
        address = urlsplit(server.url)
        with socket.create_connection((address.hostname or "", address.port or 0), timeout=10) as idle:
            idle.sendall(sent)
            answer = b""
            while part := idle.recv(4096):
                answer += part
        assert answer.startswith(b"HTTP/1.1 200 ") == (len(sent) > 20)


def test_a_closed_connection_leaves_nothing_behind() -> None:
    def connections() -> int:
        gc.collect()
        return sum(issubclass(type(each), openai_server._Protocol) for each in gc.get_objects())

    before = connections()
    with FakeTriton() as triton, serve(triton) as server:
        for _ in range(10):
            assert httpx.get(f"{server.url}/models").status_code == 200
        assert wait_until(lambda: connections() <= before, 5)


# What is seen of requests


def test_requests_are_counted_and_logged_without_their_text(tmp_path: Path) -> None:
    path, metrics = tmp_path / "access.jsonl", PortMetrics()
    with (
        FakeTriton() as triton,
        serve(triton, keys=Keys(["k"]), metrics=metrics, access_log=AccessLog(path)) as server,
    ):
        ask(server.url, "/completions", "k", model="writer", prompt="secret", stream=True)
        ask(server.url, "/completions", "k", model="writer", prompt=["secret", "secret b"], max_tokens=2)
        ask(server.url, "/completions", "k", model="writer", prompt=TOO_LONG, max_tokens=2)
        ask(server.url, "/completions", "k", model="writer", prompt=BREAKS, stream=True)
        ask(server.url, "/classify", "k", model="tweets", input=["secret", "good"])
        ask(server.url, "/classify", "k", model="secret", input=["x"])
        ask(server.url, "/secret?secret", "k")
        ask(server.url, "/classify", "secret", model="tweets", input=["x"])
        assert wait_until(lambda: len(path.read_text().splitlines()) == 8, 5)
    assert "secret" not in path.read_text()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    seen = [(row["route"], row["model"], row["status"], row["error"], row["rows"]) for row in rows]
    assert seen == [
        ("/v1/completions", "writer", 200, "", 1),
        ("/v1/completions", "writer", 200, "", 2),
        ("/v1/completions", "writer", 400, "invalid_value", 1),
        ("/v1/completions", "writer", 200, "model_restarting", 1),
        ("/v1/classify", "tweets", 200, "", 2),
        ("/v1/classify", "", 404, "model_not_found", 0),
        ("", "", 404, "404", 0),
        ("", "", 401, "invalid_api_key", 0),
    ]
    assert [row["key"] for row in rows] == ["api-key-1"] * 7 + [""]
    assert rows[0]["stream"]
    assert 0 < rows[0]["first_token_seconds"] <= rows[0]["seconds"]
    assert [row["completion_tokens"] for row in rows[1:3]] == [4, 0]

    text = metrics.text()
    assert "secret" not in text
    order = ("route", "model", "status", "error", "le")
    counted = {(s.name, *(s.labels[name] for name in order if name in s.labels)): s.value for s in parse(text)}
    assert counted["deploykit_http_requests_total", "/v1/completions", "writer", "200"] == 3
    assert counted["deploykit_http_errors_total", "/v1/classify", "", "model_not_found"] == 1
    assert counted["deploykit_http_errors_total", "", "", "invalid_api_key"] == 1
    tokens = sum(row["completion_tokens"] for row in rows)
    assert counted["deploykit_http_completion_tokens_total", "writer"] == tokens
    assert counted["deploykit_http_time_to_first_token_seconds_count", "writer"] == 2
    assert counted["deploykit_http_request_seconds_bucket", "/v1/classify", "tweets", "+Inf"] == 1
    assert counted["deploykit_http_requests_in_flight",] == 0


def test_texts_are_logged_where_asked(tmp_path: Path) -> None:
    path = tmp_path / "access.jsonl"
    with FakeTriton() as triton, serve(triton, keys=Keys(["k"]), access_log=AccessLog(path, texts=True)) as server:
        ask(server.url, "/completions", "k", model="writer", prompt="my secret", stream=True)
        answer = ask(server.url, "/classify", "k", model="tweets", input=["good"])
        ask(server.url, "/classify", "k", model="tweets", input=["é" * 900_000])
        httpx.get(f"{server.url}/models", headers={"Authorization": "Bearer k"})
        assert wait_until(lambda: len(path.read_text().splitlines()) == 4, 5)
    stream, classified, long, listed = (json.loads(line) for line in path.read_text().splitlines())
    assert json.loads(stream["request"])["prompt"] == "my secret"
    assert stream["response"].endswith("data: [DONE]\n\n")
    assert json.loads(classified["response"]) == answer.json()
    assert len(long["request"].encode(errors="replace")) <= (1 << 20) + 2
    assert long["rows"] == 1, "it is answered whole"
    assert (listed["request"], listed["response"]) == (None, None)


def test_a_full_disk_does_not_end_requests() -> None:
    with FakeTriton() as triton, serve(triton, access_log=AccessLog(Path("/dev/full"))) as server:
        for _ in range(2):
            assert httpx.get(f"{server.url}/models").status_code == 200


# TLS


def test_the_port_has_tls_with_a_certificate(tmp_path: Path) -> None:
    certfile, keyfile = certificate(tmp_path)
    context = ssl.create_default_context(cafile=certfile)
    with FakeTriton() as triton, serve(triton, certificate=Certificate(certfile, keyfile)) as server:
        assert server.url.startswith("https://127.0.0.1:")
        assert httpx.get(f"{server.url}/models", verify=context).status_code == 200
        with pytest.raises(httpx.HTTPError):
            httpx.get(f"{server.url.replace('https', 'http')}/models")


def test_a_certificate_that_cannot_be_used_is_refused(tmp_path: Path) -> None:
    certfile, keyfile = certificate(tmp_path)
    with pytest.raises(UsageError, match=r"--ssl-certfile .*nothing"):
        Certificate(tmp_path / "nothing", keyfile)
    with pytest.raises(UsageError, match="give a certificate and its private key"):
        Certificate(keyfile, certfile)
    (tmp_path / "other").mkdir()
    with pytest.raises(UsageError, match="mismatch"):
        Certificate(certfile, certificate(tmp_path / "other")[1])
