"""Generate load with little CPU: single-text requests over HTTP/1.1 keep-alive to Triton's KServe v2 API.

It shares its machine with the server, so as much work as possible is outside of the timed part: requests are encoded
before, answers are decoded after, and in between there is only one asyncio protocol.

Source: KServe Open Inference Protocol v2, REST; Triton's extension for BYTES tensors.
"""

from __future__ import annotations

import asyncio
import json
import re
import selectors
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray

from deploykit.bench.scenarios import LoadResult, Server
from deploykit.errors import first_line
from deploykit.runtime.generation import Generation
from deploykit.runtime.served import error_text, parse_url
from deploykit.tasks.protocol import Answer
from deploykit.tasks.registry import get_task, task_names, task_of

MAX_CONNECTIONS = 256
ANSWERS = tuple(outputs[0] for name in task_names() if (outputs := get_task(name).outputs))
"""The output tensors that contain an answer's text, of all tasks that are served."""
_CONNECT_PAUSE_S = 0.05  # pause before retrying: a closed loop would otherwise flood a dead server
_SWEEP_S = 0.25
_CONTENT_LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*(\d+)", re.IGNORECASE)
_CLOSING = re.compile(rb"\r\nconnection:[ \t]*close", re.IGNORECASE)
_SURROGATE = re.compile(r"[\ud800-\udfff]")


def ask_server(
    server: Server,
    texts: Sequence[str],
    rows: Iterator[int],
    load: int | NDArray[np.float64],
    *,
    generation: Generation | None = None,
    seconds: float,
    timeout_s: float,
) -> LoadResult:
    """Send ``rows`` of ``texts``. ``load`` is a number of callers, or arrival times in seconds."""
    address, tls = parse_url(server.url)
    task = task_of(server.task)
    generations: Sequence[Generation | None] = server.generations or [generation] * len(texts)
    parameters = [task.request_parameters(server.task, each) for each in generations]
    inputs = [task.tensors(server.task, text) for text in texts]
    requests = encode_requests(address, server.model, inputs, task.outputs, parameters)
    generator = _Generator(address.partition("/")[0], tls, requests, rows, timeout_s)
    if isinstance(load, int):
        loop: asyncio.AbstractEventLoop = asyncio.new_event_loop()
        work = generator.closed_loop(load, seconds)
    else:
        # select() sleeps to the microsecond; asyncio's default, epoll, rounds up to whole milliseconds,
        # which would count as the server's latency.
        loop = asyncio.SelectorEventLoop(selectors.SelectSelector())
        work = generator.open_loop(load)
    try:
        loop.run_until_complete(work)
    finally:
        loop.close()
    return generator.answers()


def encode_requests(
    address: str,
    model: str,
    inputs: Sequence[Mapping[str, str]],
    outputs: Sequence[str],
    parameters: Sequence[Mapping[str, Any]],
) -> list[bytes]:
    """Return an HTTP request for the texts of each input tensor with its ``parameters``, requesting ``outputs``.

    Requests and responses are JSON, as most clients use it. For one short text, Triton's binary extension saves less
    CPU time than two rounds differ by.
    """
    host, _, path = address.partition("/")
    path = f"/{path}" if path else ""
    head = f"POST {path}/v2/models/{quote(model)}/infer HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    requests = []
    for texts, given in zip(inputs, parameters):
        tensors = [
            {"name": name, "shape": [1, 1], "datatype": "BYTES", "data": [_SURROGATE.sub("\ufffd", text)]}
            for name, text in texts.items()
        ]
        request: dict[str, Any] = {"inputs": tensors, "outputs": [{"name": name} for name in outputs]}
        if given:
            request["parameters"] = dict(given)
        body = json.dumps(request, ensure_ascii=False).encode()
        requests.append(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    return requests


def answer_of(body: bytes) -> Answer:
    """Return the answer in a response body. Raises ValueError if it is neither a label nor a translation."""
    try:
        outputs = {output["name"]: output["data"][0] for output in json.loads(body)["outputs"]}
        text = next(outputs[name] for name in ANSWERS if name in outputs)
        return Answer(str(text), int(outputs.get("TARGET_TOKENS", 0)))
    except (LookupError, TypeError, StopIteration) as error:
        raise ValueError(f"the answer has neither {' nor '.join(ANSWERS)}") from error


class _Connection(asyncio.Protocol):
    """A keep-alive connection with at most one request in flight, that of ``row``; -1 when idle."""

    def __init__(
        self, answered: Callable[[_Connection, bytes, bytes, bool], None], lost: Callable[[_Connection], None]
    ):
        self._answered = answered
        self._lost = lost
        self._received = b""
        self.transport: asyncio.Transport
        self.row = -1
        self.due = self.sent = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def send(self, request: bytes, row: int, due: float) -> None:
        self.row, self.due, self.sent = row, due, time.perf_counter()
        self.transport.write(request)

    def data_received(self, data: bytes) -> None:
        if self._received:
            data = self._received + data
        end = data.find(b"\r\n\r\n")
        length = _CONTENT_LENGTH.search(data, 0, end) if end >= 0 else None
        if length is not None and len(data) >= end + 4 + int(length[1]):
            self._received = b""
            keep = _CLOSING.search(data, 0, end) is None
            self._answered(self, data[9:12], data[end + 4 :], keep)
        elif end >= 0 and length is None:
            self._received = b""
            self._answered(self, b"an answer without Content-Length", b"", False)
        else:
            self._received = data

    def connection_lost(self, error: Exception | None) -> None:
        self._lost(self)


class _Generator:
    """Sends requests. Due requests wait for an idle connection; there are at most ``_limit`` connections."""

    def __init__(
        self, address: str, tls: bool, requests: Sequence[bytes], rows: Iterator[int], timeout_s: float
    ) -> None:
        host, _, port = address.rpartition(":")
        self._host, self._port, self._tls = host.strip("[]"), int(port), tls
        self._requests = requests
        self._rows = rows
        self._timeout_s = timeout_s
        self._limit = 1
        self._stop_at = 0.0
        self._waiting: deque[tuple[int, float]] = deque()
        self._connections: set[_Connection] = set()
        self._idle: list[_Connection] = []
        self._connecting: set[asyncio.Task[None]] = set()
        self._unanswered = 0
        self._all_answered = asyncio.Event()
        self._latencies: list[float] = []
        self._lags: list[float] = []
        self._bodies: list[tuple[int, bytes]] = []
        self._errors: Counter[str] = Counter()
        self._duration_s = self._cpu_s = 0.0

    async def closed_loop(self, concurrency: int, seconds: float) -> None:
        self._limit = concurrency
        await self._open_connections(concurrency)
        started = self._start()
        self._stop_at = started + seconds
        for _ in range(concurrency):
            self._send_row(next(self._rows), started)
        await self._finish(started)

    async def open_loop(self, arrivals: NDArray[np.float64]) -> None:
        self._limit = MAX_CONNECTIONS
        await self._open_connections(8)
        started = self._start()
        for due in arrivals.tolist():
            # Sleep even when late, so that answers are read between requests.
            await asyncio.sleep(max(0.0, started + due - time.perf_counter()))
            self._send_row(next(self._rows), started + due)
        await self._finish(started)

    def answers(self) -> LoadResult:
        """Decode the answers, after the timed part."""
        texts: dict[int, str] = {}
        tokens = 0
        good = np.ones(len(self._bodies), bool)
        for i, (row, body) in enumerate(self._bodies):
            try:
                answer = answer_of(body)
            except ValueError as error:
                good[i] = False
                self._errors[first_line(error)] += 1
            else:
                texts[row] = answer.text
                tokens += answer.tokens
        latencies = np.array(self._latencies)[good] * 1e3
        lags = np.array(self._lags) * 1e3
        return LoadResult(
            self._duration_s, self._cpu_s, latencies, texts, tokens, self._errors, lags if len(lags) else None
        )

    async def _open_connections(self, count: int) -> None:
        await asyncio.gather(*(self._connect() for _ in range(count)))

    def _start(self) -> float:
        self._errors.clear()  # a refusal before the timed part will repeat
        self._sweeper = asyncio.ensure_future(self._give_up_old_requests())
        self._cpu_s = time.process_time()
        return time.perf_counter()

    async def _finish(self, started: float) -> None:
        """Wait until every request is answered or given up, then close."""
        while self._unanswered:
            self._all_answered.clear()
            await self._all_answered.wait()
        self._duration_s = time.perf_counter() - started
        self._cpu_s = time.process_time() - self._cpu_s
        for task in (self._sweeper, *self._connecting):
            task.cancel()
        for connection in list(self._connections):
            connection.transport.abort()
        await asyncio.sleep(0)  # give connection_lost time to run

    def _send_row(self, row: int, due: float) -> None:
        self._unanswered += 1
        self._waiting.append((row, due))
        self._send_waiting()

    def _send_waiting(self) -> None:
        while self._waiting and self._idle:
            row, due = self._waiting.popleft()
            self._idle.pop().send(self._requests[row], row, due)
        if len(self._waiting) > len(self._connecting) and self._limit > len(self._connections) + len(self._connecting):
            task = asyncio.ensure_future(self._connect())
            self._connecting.add(task)
            task.add_done_callback(self._connected)

    async def _connect(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            _, connection = await loop.create_connection(
                lambda: _Connection(self._on_answer, self._on_lost), self._host, self._port, ssl=self._tls or None
            )
        except OSError as error:
            await asyncio.sleep(_CONNECT_PAUSE_S)
            if self._waiting:
                self._waiting.popleft()
                self._settle(first_line(error))
        else:
            self._connections.add(connection)
            self._idle.append(connection)

    def _connected(self, task: asyncio.Task[None]) -> None:
        self._connecting.discard(task)
        if not task.cancelled():
            self._send_waiting()

    def _on_answer(self, connection: _Connection, status: bytes, body: bytes, keep: bool) -> None:
        row, connection.row = connection.row, -1
        if keep:
            self._idle.append(connection)
        else:
            self._connections.discard(connection)
            connection.transport.abort()
        if row < 0:
            return  # unexpected data
        if status == b"200":
            self._latencies.append(time.perf_counter() - connection.due)
            self._lags.append(connection.sent - connection.due)
            self._bodies.append((row, body))
            self._settle(None)
        else:
            self._settle(f"{status.decode(errors='replace')} {error_text(body)}".strip())

    def _on_lost(self, connection: _Connection) -> None:
        self._fail_request(connection, "the server closed the connection without an answer")

    def _fail_request(self, connection: _Connection, message: str) -> None:
        if connection not in self._connections:
            return
        self._connections.discard(connection)
        if connection in self._idle:
            self._idle.remove(connection)
        if connection.row >= 0:
            connection.row = -1
            self._settle(message)

    def _settle(self, error: str | None) -> None:
        """Record the result of a request. In a closed loop, its caller then sends the next one."""
        self._unanswered -= 1
        if error is not None:
            self._errors[error] += 1
        if (now := time.perf_counter()) < self._stop_at:
            self._send_row(next(self._rows), now)
        else:
            self._send_waiting()
        if not self._unanswered:
            self._all_answered.set()

    async def _give_up_old_requests(self) -> None:
        """Give up requests that are too old: those sent, and those that never got a connection."""
        message = f"no answer within {self._timeout_s:g} s"
        while True:
            await asyncio.sleep(_SWEEP_S)
            oldest = time.perf_counter() - self._timeout_s
            for connection in [c for c in self._connections if c.row >= 0 and c.due < oldest]:
                self._fail_request(connection, message)
                connection.transport.abort()
            while self._waiting and self._waiting[0][1] < oldest:
                self._waiting.popleft()
                self._settle(message)
