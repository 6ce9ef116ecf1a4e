"""Routes, faults and clients that go away, over real sockets: uvicorn, gRPC, a fake Triton."""

from __future__ import annotations

import gzip
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from fake_generator import BREAKS, ENDLESS, FULL, HANGS, LOST, SLOW, TOO_LONG
from fake_triton import FakeTriton
from grpc import StatusCode
from grpc.aio import AioRpcError, Metadata
from openai_service import Service, serve
from served import wait_until
from tritonclient.grpc.aio import InferenceServerClient

from deploykit.errors import ServerError
from deploykit.openai import triton_generator
from deploykit.openai.limits import Limits
from deploykit.triton.preflight import listen

MESSAGES = [{"role": "user", "content": "Hello"}]
TOOL = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}}  # fmt: skip


@pytest.fixture(scope="module")
def client(service: Service) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=service.url, timeout=10) as client:
        yield client


def complete(client: httpx.Client, prompt: str, **fields: Any) -> httpx.Response:
    return client.post("/completions", json={"model": "writer", "prompt": prompt, **fields})


def events(response: httpx.Response) -> list[Any]:
    """Return the contents of the response's events, the last one as text if it is [DONE]."""
    parts = [line.removeprefix("data: ") for line in response.text.splitlines() if line]
    return [part if part == "[DONE]" else json.loads(part) for part in parts]


# Routes


def test_models_of_all_tasks_are_listed(client: httpx.Client) -> None:
    listed = client.get("/models").json()
    assert [(model["id"], model["task"]) for model in listed["data"]] == [
        ("writer", "text-generation"),
        ("tweets", "classification"),
        ("en-fr", "translation"),
    ]
    assert client.get("/models/tweets").json() == listed["data"][1]


def test_texts_are_classified_and_a_refused_one_fails_alone(client: httpx.Client) -> None:
    answer = client.post("/classify", json={"model": "tweets", "input": ["good day", "refuse this", "rain"]})
    assert answer.status_code == 200
    good, refused, bad = answer.json()["data"]
    assert (good["index"], good["label"], good["score"]) == (0, "good", 0.75)
    assert refused == {"index": 1, "error": "this text is refused"}
    assert bad["label"] == "bad"
    only = client.post("/classify", json={"model": "tweets", "input": "refuse this"})
    assert only.status_code == 400
    assert only.json()["error"]["param"] == "input"


def test_texts_are_translated(client: httpx.Client) -> None:
    answer = client.post("/translate", json={"model": "en-fr", "input": ["one", "two"]}).json()
    assert [(row["index"], row["translation"]) for row in answer["data"]] == [(0, "ONE"), (1, "TWO")]


def test_a_pair_is_refused_by_a_model_of_single_texts(client: httpx.Client) -> None:
    answer = client.post("/classify", json={"model": "tweets", "input": [["a", "b"]]})
    assert answer.status_code == 400
    assert "the model reads one text" in answer.json()["error"]["message"]


def test_a_full_queue_of_a_classifier_is_429(client: httpx.Client) -> None:
    assert client.post("/classify", json={"model": "tweets", "input": "full"}).status_code == 429


@pytest.mark.parametrize(
    ("route", "model", "fields"),
    [("translate", "tweets", {"input": "x"}), ("classify", "writer", {"input": "x"}),
     ("chat/completions", "tweets", {"messages": MESSAGES}), ("completions", "tweets", {"prompt": "x"})],
)  # fmt: skip
def test_a_model_on_a_route_of_another_task_is_refused(
    client: httpx.Client, route: str, model: str, fields: dict[str, Any]
) -> None:
    answer = client.post(f"/{route}", json={"model": model, **fields})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "wrong_task")
    unknown = client.post(f"/{route}", json={"model": "nobody", **fields})
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "model_not_found")


def test_health_follows_triton(service: Service, client: httpx.Client) -> None:
    root = service.url.removesuffix("/v1")
    assert client.get(f"{root}/health").status_code == 200
    service.triton.model.lost_for = 1
    assert client.get(f"{root}/health").status_code == 503
    service.triton.model.lost_for = 0


def test_metrics_are_tritons_and_the_ports(service: Service) -> None:
    with FakeTriton() as triton, serve(triton, metrics_url=f"{service.url}/models") as server:
        answer = httpx.get(f"{server.url.removesuffix('/v1')}/metrics")
    assert answer.text.startswith('{"object":"list"')
    assert "\ndeploykit_triton_up 1.0\n" in answer.text
    assert answer.headers["content-type"].startswith("text/plain")


def test_metrics_say_that_triton_is_away() -> None:
    with FakeTriton() as triton, serve(triton, metrics_url="http://127.0.0.1:1/metrics") as server:
        answer = httpx.get(f"{server.url.removesuffix('/v1')}/metrics")
    assert answer.status_code == 200
    assert "\ndeploykit_triton_up 0.0\n" in answer.text


def test_unknown_routes_and_methods_have_errors_of_the_apis_form(client: httpx.Client) -> None:
    for answer, status in ((client.get("/no/such"), 404), (client.get("/completions"), 405)):
        assert answer.status_code == status
        assert answer.json()["error"]["type"] == "invalid_request_error"


# What is sent to the model


def test_fields_reach_the_model_under_its_names(service: Service, client: httpx.Client) -> None:
    complete(client, "x", max_tokens=3, min_tokens=1, top_k=5, min_p=0.1, typical_p=0.9, seed=4, stop="!", n=2,
             logit_bias={"7": -100}, presence_penalty=1, repetition_penalty=1.2, ignore_eos=True, stop_token_ids=[3],
             user="me", metadata={"a": 1}, temperature=None, response_format={"type": "text"})  # fmt: skip
    assert service.triton.model.asked[-1].sampling == {
        "max_new_tokens": 3, "min_new_tokens": 1, "top_k": 5, "min_p": 0.1, "typical_p": 0.9, "seed": 4, "stop": ["!"],
        "n": 2, "logit_bias": {"7": -100}, "presence_penalty": 1, "repetition_penalty": 1.2, "ignore_eos": True,
        "stop_token_ids": [3],
    }  # fmt: skip


def test_without_a_seed_each_request_draws_its_own(service: Service, client: httpx.Client) -> None:
    seeds = set()
    for _ in range(3):
        client.post("/chat/completions", json={"model": "writer", "messages": MESSAGES})
        sampling = service.triton.model.asked[-1].sampling
        assert sampling.keys() == {"n", "seed"}
        seeds.add(sampling["seed"])
    assert len(seeds) == 3


def test_prompts_may_be_token_ids(service: Service, client: httpx.Client) -> None:
    for given, sent in (([7, 8], [[7, 8]]), ([[7, 8], [9]], [[7, 8], [9]])):
        body = {"model": "writer", "prompt": given, "echo": True, "max_tokens": 0}
        choices = client.post("/completions", json=body).json()["choices"]
        asked = service.triton.model.asked[-len(sent) :]
        assert sorted((one.ids for one in asked), key=str) == sent
        assert all(one.text is None for one in asked)
        assert [choice["text"] for choice in choices] == [" ".join(f"w{i}" for i in ids) for ids in sent]


def test_messages_are_written_as_templates_read_them(service: Service, client: httpx.Client) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Oslo"}'}}
    messages = [
        {"role": "developer", "content": "Be short."},
        {"role": "user", "content": [{"type": "text", "text": "Wea"}, {"type": "text", "text": "ther?"}]},
        {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None},
        {"role": "tool", "tool_call_id": "c1", "content": "Sunny"},
    ]
    body = {"model": "writer", "messages": messages, "tools": [TOOL]}
    assert client.post("/chat/completions", json=body).status_code == 200
    sent = json.loads(service.triton.model.asked[-1].messages or "")
    assert sent["tools"] == [TOOL]
    assert [m["role"] for m in sent["messages"]] == ["system", "user", "assistant", "tool"]
    assert [m["content"] for m in sent["messages"]] == ["Be short.", "Weather?", "", "Sunny"]
    assert sent["messages"][2]["tool_calls"][0]["function"]["arguments"] == {"city": "Oslo"}
    client.post("/chat/completions", json={**body, "tool_choice": "none"})
    assert isinstance(json.loads(service.triton.model.asked[-1].messages or ""), list)


def test_best_of_is_the_models_work(client: httpx.Client, service: Service) -> None:
    answer = complete(client, "x", temperature=1, best_of=4, n=2).json()
    assert len(answer["choices"]) == 2
    assert service.triton.model.asked[-1].sampling["best_of"] == 4


def test_a_call_in_hermes_form_is_streamed_as_a_call(client: httpx.Client) -> None:
    body = {"model": "writer", "messages": [{"role": "user", "content": "weather?"}], "tools": [TOOL]}
    message = client.post("/chat/completions", json=body).json()["choices"][0]["message"]
    assert message["content"] == "I look it up."
    assert message["tool_calls"][0]["function"] == {"name": "get_weather", "arguments": '{"city": "Oslo"}'}
    *chunks, done = events(client.post("/chat/completions", json={**body, "stream": True}))
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert done == "[DONE]"
    assert "".join(delta.get("content") or "" for delta in deltas) == message["content"]
    (call,) = [call for delta in deltas for call in delta.get("tool_calls", ())]
    assert call["function"] == message["tool_calls"][0]["function"]
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"


# Faults


def test_a_full_queue_is_429(client: httpx.Client) -> None:
    for stream in (False, True):
        answer = complete(client, FULL, stream=stream)
        assert (answer.status_code, answer.json()["error"]["type"]) == (429, "rate_limit_error")
        assert "retry-after" in answer.headers


def test_a_refusal_of_the_model_names_the_field(client: httpx.Client) -> None:
    answer = complete(client, TOO_LONG, stream=True)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "prompt")
    assert "2048" in answer.json()["error"]["message"]


def test_a_stream_whose_model_dies_ends_with_an_error(client: httpx.Client) -> None:
    first, last = events(complete(client, BREAKS, stream=True))
    assert first["choices"][0]["text"] == "Paris"
    assert (last["error"]["type"], last["error"]["code"]) == ("server_error", "model_restarting")


def test_one_failed_prompt_ends_the_request(service: Service, client: httpx.Client) -> None:
    body = {"model": "writer", "prompt": [ENDLESS, BREAKS], "stream": True}
    assert "error" in events(client.post("/completions", json=body))[-1]
    full = client.post("/completions", json={**body, "prompt": [HANGS, FULL]})
    assert full.status_code == 429
    assert wait_until(lambda: service.triton.model.running == 0, 5)


def test_a_new_request_waits_while_triton_restarts(client: httpx.Client, service: Service) -> None:
    service.triton.model.lost_for = 2
    assert complete(client, "x").status_code == 200
    assert service.triton.model.lost_for == 0


def test_a_request_that_is_not_sent_whole_is_sent_again(client: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """grpc fails in this way if Triton ends between the header and the message of a stream."""
    stream_infer = InferenceServerClient.stream_infer
    lost = []

    class Lost:
        async def __aiter__(self) -> AsyncIterator[Any]:
            lost.append(self)
            raise AioRpcError(StatusCode.INTERNAL, Metadata(), Metadata(), "Internal error from Core")
            yield

        def cancel(self) -> None:
            pass

    def stream_second(self: Any, requests: Any, **options: Any) -> Any:
        return stream_infer(self, requests, **options) if lost else Lost()

    monkeypatch.setattr(InferenceServerClient, "stream_infer", stream_second)
    assert complete(client, "x", stream=True).status_code == 200
    assert len(lost) == 1


def test_a_model_that_stays_away_is_503(client: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_generator, "PATIENCE_S", 0.3)
    for stream in (False, True):
        answer = complete(client, LOST, stream=stream)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "model_restarting")


def test_requests_are_answered_again_after_the_server_was_replaced() -> None:
    with FakeTriton() as first, serve(first) as server, httpx.Client(base_url=server.url, timeout=10) as client:
        assert complete(client, "x").status_code == 200
        port = int(first.address.rpartition(":")[2])
        with client.stream(
            "POST", "/completions", json={"model": "writer", "prompt": ENDLESS, "stream": True}
        ) as open_:
            lines = open_.iter_lines()
            next(lines)
            first.kill()
            assert "model_restarting" in list(filter(None, lines))[-1]
        answers: list[int] = []
        waiting = threading.Thread(target=lambda: answers.append(complete(client, "x").status_code))
        waiting.start()
        with FakeTriton(port):
            waiting.join()
        assert answers == [200]


def test_a_request_that_waited_long_is_tried_again_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_generator, "PATIENCE_S", 2.0)
    with (
        FakeTriton() as first, serve(first) as server,
        httpx.Client(base_url=server.url, timeout=30) as client, ThreadPoolExecutor(1) as pool,
    ):  # fmt: skip
        waiting = pool.submit(complete, client, HANGS)
        assert wait_until(lambda: first.model.running == 1, 5)
        time.sleep(2.1)  # longer than a lost one is tried again
        port = int(first.address.rpartition(":")[2])
        first.kill()
        with FakeTriton(port) as second:
            assert wait_until(lambda: second.model.running == 1 or waiting.done(), 10)
            assert not waiting.done()
            second.kill()
        assert waiting.result().status_code == 503


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prompt", [HANGS, ENDLESS])
@pytest.mark.parametrize("route", ["completions", "chat/completions"])
def test_a_client_that_goes_away_cancels_its_request(service: Service, route: str, prompt: str, stream: bool) -> None:
    before = len(service.triton.model.asked)
    fields = (
        {"prompt": [prompt, prompt]} if route == "completions" else {"messages": [{"role": "user", "content": prompt}]}
    )
    content = json.dumps({"model": "writer", "stream": stream, **fields}).encode()
    address = urlsplit(service.url)
    with socket.create_connection((address.hostname, address.port)) as connection:
        head = f"POST /v1/{route} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n\r\n"
        connection.sendall(head.encode() + content)
        if stream and prompt == ENDLESS:
            assert b"200 OK" in connection.recv(1000)
        assert wait_until(lambda: len(service.triton.model.asked) > before and service.triton.model.running > 0, 5)
    assert wait_until(lambda: service.triton.model.running == 0, 5)


def test_a_client_that_reads_nothing_stops_nobody(service: Service, client: httpx.Client) -> None:
    content = json.dumps({"model": "writer", "stream": True, "prompt": ENDLESS}).encode()
    address = urlsplit(service.url)
    with socket.create_connection((address.hostname, address.port)) as connection:
        connection.sendall(
            f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n\r\n".encode()
        )
        connection.sendall(content)
        assert wait_until(lambda: service.triton.model.running > 0, 5)
        time.sleep(0.5)  # its buffers fill
        assert complete(client, "x").status_code == 200
    assert wait_until(lambda: service.triton.model.running == 0, 5)


# Bodies


@pytest.mark.parametrize(
    ("content", "status", "told"),
    [
        (b"", 400, "not JSON"), (b"{", 400, "not JSON"), (b"[]", 400, "JSON object"), (b"\xff{}", 400, "byte 0xff at position 0"),
        (b'{"seed": NaN}', 400, "NaN"), (b"[" * 100_000, 400, "not JSON"), (b'{"seed": ' + b"9" * 5000 + b"}", 400, "not JSON"),
        (b'{"metadata": ' + b"[" * 70 + b"]" * 70 + b"}", 400, "metadata: nested"),
        (b'{"model": "writer", "prompt": "\\ud800"}', 400, "prompt: the text has half a surrogate"),
        (b'{"model": "writer", "prompt": "x", "metadata": {"\\udc00": 1}}', 400, "metadata.?: the text has half"),
        (b'{"a": "' + b"x" * Limits().max_body_bytes + b'"}', 413, "more than 8,388,608 bytes"),
    ],
)  # fmt: skip
def test_a_body_that_is_no_request_is_refused(client: httpx.Client, content: bytes, status: int, told: str) -> None:
    answer = client.post("/completions", content=content)
    assert (answer.status_code, told in answer.json()["error"]["message"]) == (status, True), answer.text


def test_a_compressed_body_is_refused(client: httpx.Client) -> None:
    answer = client.post("/completions", content=gzip.compress(b"{}"), headers={"content-encoding": "gzip"})
    assert (answer.status_code, "without compression" in answer.json()["error"]["message"]) == (415, True)


# Stopping


def test_a_stop_lets_streams_finish_and_accepts_no_more() -> None:
    with FakeTriton() as triton:
        answers: list[str] = []
        with serve(triton, drain=10.0) as server:
            body = {"model": "writer", "prompt": SLOW, "stream": True}
            asking = threading.Thread(
                target=lambda: answers.append(httpx.post(f"{server.url}/completions", json=body, timeout=20).text)
            )
            asking.start()
            assert wait_until(lambda: triton.model.running > 0, 5)
        asking.join()
        assert answers[0].endswith("data: [DONE]\n\n")
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{server.url}/models")


def test_a_stop_cancels_what_outlives_the_drain_time() -> None:
    with FakeTriton() as triton:
        with serve(triton, drain=0.5) as server:
            asking = threading.Thread(target=ask_forever, args=(server.url,))
            asking.start()
            assert wait_until(lambda: triton.model.running > 0, 5)
        asking.join()
        assert wait_until(lambda: triton.model.running == 0, 5)


def ask_forever(url: str) -> None:
    with pytest.raises(httpx.HTTPError):
        httpx.post(f"{url}/completions", json={"model": "writer", "prompt": ENDLESS, "stream": True}, timeout=20)


def test_answers_do_not_wait_for_the_clients_acknowledgement() -> None:
    with listen("openai", "127.0.0.1", 0) as listener:
        assert listener.proto == socket.IPPROTO_TCP  # what asyncio needs in order to set TCP_NODELAY


def test_a_port_in_use_is_named_with_its_option() -> None:
    with (
        listen("openai", "127.0.0.1", 0) as used,
        pytest.raises(ServerError, match=r"openai port .* is in use") as raised,
    ):
        listen("openai", "127.0.0.1", used.getsockname()[1])
    assert "--openai-port" in (raised.value.remedy or "")
