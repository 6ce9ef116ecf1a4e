"""The HTTP load generator, against a small server that misbehaves on request."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from deploykit.bench.http import answer_of, encode_requests
from deploykit.bench.load import Measurement, measure
from deploykit.bench.scenarios import ClosedLoop, Poisson, Server
from deploykit.runtime.generation import Generation, override
from deploykit.tasks.classification.facts import Classification
from deploykit.tasks.protocol import Answer, TaskFacts
from deploykit.tasks.translation.facts import Translation

CLASSIFICATION = Classification(("a", "b"), max_length=8, pad_token_id=0)
TRANSLATION = Translation("en", "fr", "marian", vocabulary=100, max_source_length=64, max_target_length=64, pad_token_id=99,
                          eos_token_ids=(0,), decoder_start_token_id=99)  # fmt: skip
TEXTS = ["good", "bad", "表情 😀", 'quote " and \\ and \ud800']


class FakeTriton:
    """Answers with the text itself as the label, or as a translation of three tokens.

    Request number n gets behaviour n % len(behaviours).
    """

    def __init__(self, *behaviours: str, task: TaskFacts = CLASSIFICATION) -> None:
        self.behaviours = behaviours
        self.task = task
        self.parameters: Any = None
        self.asked: list[str] = []
        self.sent_ok = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await self._answer(reader, writer):
                pass
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        assert head.startswith("POST /v2/models/m/infer HTTP/1.1\r\n")
        length = next(int(line[15:]) for line in head.split("\r\n") if line.startswith("Content-Length:"))
        request = json.loads(await reader.readexactly(length))
        translates = isinstance(self.task, Translation)
        wanted = ["TRANSLATION", "TARGET_TOKENS"] if translates else ["LABEL", "SCORES"]
        assert [o["name"] for o in request["outputs"]] == wanted
        self.parameters = request.get("parameters")
        text = request["inputs"][0]["data"][0]
        behaviour = self.behaviours[len(self.asked) % len(self.behaviours)]
        self.asked.append(text)
        if behaviour == "close":
            return False
        if behaviour == "hang":
            await asyncio.sleep(30)
        outputs = [{"name": wanted[0], "datatype": "BYTES", "shape": [1, 1], "data": [text]}]
        if translates:
            outputs.append({"name": "TARGET_TOKENS", "datatype": "INT32", "shape": [1, 1], "data": [3]})
        body = json.dumps({"outputs": outputs if behaviour != "no answer" else []}).encode()
        status = "200 OK"
        if behaviour == "503":
            status, body = "503 Service Unavailable", b'{"error":"queue is full"}'
        last = behaviour == "ok, then close"
        answer = f"HTTP/1.1 {status}\r\n{'Connection: close' if last else 'A: b'}\r\n".encode()
        answer += f"content-length: {len(body)}\r\n\r\n".encode()
        if behaviour == "chunks":
            writer.write(answer + body[:5])
            await writer.drain()
            await asyncio.sleep(0.002)
            writer.write(body[5:])
        else:
            writer.write(answer + body)
        await writer.drain()
        self.sent_ok += status.startswith("200") and behaviour != "no answer"
        return not last


@contextmanager
def running(fake: FakeTriton) -> Iterator[Server]:
    loop = asyncio.new_event_loop()
    server = loop.run_until_complete(asyncio.start_server(fake.serve, "127.0.0.1", 0))
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    async def stop() -> None:
        server.close()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    try:
        yield Server(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", "m", fake.task)
    finally:
        asyncio.run_coroutine_threadsafe(stop(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def ask(
    fake: FakeTriton,
    scenario: ClosedLoop | Poisson,
    timeout_s: float = 5.0,
    seconds: float = 0.4,
    generation: Generation | None = None,
) -> Measurement:
    with running(fake) as server:
        m = measure(server, TEXTS, scenario, seconds=seconds, generation=generation, warmup_s=0, timeout_s=timeout_s)
    assert m.requests == len(m.latencies_ms) + m.errors
    assert m.errors == sum(m.error_examples.values())
    return m


@pytest.mark.parametrize("scenario", [ClosedLoop(1), ClosedLoop(5), Poisson(200.0)])
@pytest.mark.parametrize("behaviour", ["ok", "chunks", "ok, then close"])
def test_every_request_is_answered(scenario: ClosedLoop | Poisson, behaviour: str) -> None:
    fake = FakeTriton(behaviour)
    m = ask(fake, scenario)
    assert m.error_examples == {}
    assert m.requests == fake.sent_ok > 4
    assert m.answers == {0: "good", 1: "bad", 2: "表情 😀", 3: 'quote " and \\ and \ufffd'}
    assert (m.latencies_ms > 0).all()
    assert m.peak_memory_mb is not None


def test_a_translator_is_asked_for_translations_and_their_tokens() -> None:
    fake = FakeTriton("ok", "503", "no answer", task=TRANSLATION)
    m = ask(fake, ClosedLoop(2), generation=override(TRANSLATION, {"beam_size": 4, "length_penalty": 0.5}))
    assert fake.parameters == {"beam_size": 4, "length_penalty": "0.5"}
    assert set(m.error_examples) == {
        "503 queue is full",
        "the answer has neither LABEL nor TRANSLATION nor ANSWER nor text_output",
    }
    assert set(m.answers.values()) <= {"good", "bad", "表情 😀", 'quote " and \\ and \ufffd'}
    assert m.tokens == 3 * len(m.latencies_ms) > 0
    assert m.tokens_per_s == pytest.approx(3 * m.throughput_per_s)


def test_a_translators_own_search_needs_no_parameters() -> None:
    fake = FakeTriton("ok", task=TRANSLATION)
    ask(fake, ClosedLoop(1), seconds=0.1)
    assert fake.parameters is None


def test_every_scheduled_request_is_sent() -> None:
    fake = FakeTriton("ok")
    m = ask(fake, Poisson(300.0))
    assert len(fake.asked) == m.requests == len(Poisson(300.0).arrivals(0.4, 0))
    assert m.send_lag_ms is not None


def test_refusals_and_lost_connections_are_errors_with_their_message() -> None:
    fake = FakeTriton("ok", "503", "chunks", "close", "no answer")
    m = ask(fake, ClosedLoop(3))
    assert set(m.error_examples) == {
        "503 queue is full",
        "the server closed the connection without an answer",
        "the answer has neither LABEL nor TRANSLATION nor ANSWER nor text_output",
    }
    assert m.requests - m.errors == fake.sent_ok
    assert m.requests == len(fake.asked)


@pytest.mark.parametrize("scenario", [ClosedLoop(3), Poisson(50.0)])
def test_a_server_that_does_not_answer_is_given_up(scenario: ClosedLoop | Poisson) -> None:
    m = ask(FakeTriton("hang"), scenario, timeout_s=0.3)
    assert m.requests == m.errors > 0
    assert set(m.error_examples) == {"no answer within 0.3 s"}


def test_stalls_are_charged_from_the_scheduled_arrival() -> None:
    class Stalling(FakeTriton):
        async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
            if len(self.asked) == 10:
                self.asked.append("")
                threading.Event().wait(0.4)  # the whole server, all connections
            return await super()._answer(reader, writer)

    m = ask(Stalling("ok"), Poisson(200.0), seconds=0.8)
    assert (m.latencies_ms > 100).sum() > 20


def test_without_a_server_every_request_is_an_error_and_nothing_is_raised() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    m = measure(Server(url, "m", CLASSIFICATION), TEXTS, ClosedLoop(2), seconds=0.3, warmup_s=0)
    assert 0 < m.requests == m.errors < 50
    assert m.peak_memory_mb is None


def test_requests_keep_the_servers_path_and_hold_whole_bytes() -> None:
    (request,) = encode_requests("host:80/prefix", "m", [{"TEXT": "é"}], ["LABEL"], [{}])
    head, _, body = request.partition(b"\r\n\r\n")
    assert head.startswith(b"POST /prefix/v2/models/m/infer HTTP/1.1\r\nHost: host:80\r\n")
    assert f"Content-Length: {len(body)}".encode() in head


@pytest.mark.parametrize("body", [b"", b"[]", b"{}", b'{"outputs":[{"name":"LABEL","data":[]}]}', b"\xff"])
def test_an_answer_without_a_label_is_an_error(body: bytes) -> None:
    with pytest.raises(ValueError, match=r"LABEL|JSON|decode|Expecting"):
        answer_of(body)


def test_answers_of_both_tasks_are_read() -> None:
    body = {"outputs": [{"name": "SCORES", "data": [0.5, 0.5]}, {"name": "LABEL", "data": ["yes"]}]}
    assert answer_of(json.dumps(body).encode()) == Answer("yes")
    body = {"outputs": [{"name": "TARGET_TOKENS", "data": [7]}, {"name": "TRANSLATION", "data": ["oui"]}]}
    assert answer_of(json.dumps(body).encode()) == Answer("oui", 7)
