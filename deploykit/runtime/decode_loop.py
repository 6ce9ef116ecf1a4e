"""In-flight batching: a decoder runs in its own thread, and requests join and leave its batch between steps.

A request is one or more units of work: the sentences of texts, or a prompt. Waiting requests take turns, one unit each, so
that a long document does not block a short text behind it. Answers are sent from another thread: Triton is slow to take an
answer, and the running batch should not wait for it.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence, Sized
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any, Generic, Protocol, TypeVar

from deploykit.errors import QueueFullError
from deploykit.runtime.tracing import Stage

_CHECK_INTERVAL_S = 0.005
_REPORT_INTERVAL_S = 0.1


class Unit(Protocol):
    """A piece of work for a decoder. ``cancelled`` may be set at any time: the unit then leaves without a result."""

    cancelled: bool

    @property
    def claims(self) -> int:
        """Number of rows that it takes."""


class UnitDecoder(Protocol):
    """The part of a decoder that the loop uses. ``tokens``: number of generated tokens."""

    max_rows: int
    tokens: int

    @property
    def running(self) -> Sized: ...

    @property
    def waiting(self) -> Sized: ...

    @property
    def claimed(self) -> int:
        """Number of rows that the running and waiting units take."""

    @property
    def cache_use(self) -> float:
        """Share of the key-value caches that the running units may need at most, 0 to 1."""

    def add(self, unit: Any) -> None:
        """Append a unit to the waiting ones."""

    def step(self) -> Sequence[Any]:
        """Let units join, decode one or more tokens of each unit, and return the finished units."""


class Decoding(Protocol):
    """A model with a decoder: a translator, or a generator of text."""

    @property
    def decoder(self) -> Any:
        """Its ``UnitDecoder``."""


Model = TypeVar("Model", bound=Decoding)


class Client(Protocol):
    """The sender of a request. All methods are called in one thread, which is not the loop's."""

    def is_cancelled(self) -> bool:
        """Return whether the request was cancelled."""

    def answer(self) -> None:
        """Send the answer: all units are done."""

    def fail(self, error: Exception | None) -> None:
        """Send an error instead of an answer; None if the request was cancelled."""


@dataclass(frozen=True)
class Load:
    """Rows (or sentences) in the decoder, and units in the queue; tokens generated and requests cancelled since the
    loop began; the share of the key-value caches in use."""

    running: int
    waiting: int
    tokens: int
    cancelled: int
    cache_use: float


class _Request:
    """A submitted request. ``waiting`` units are not in the decoder yet; ``left`` counts those that are not done."""

    def __init__(self, client: Client, units: Sequence[Unit]) -> None:
        self.client = client
        self.units = units
        self.waiting = deque(units)
        self.left = len(units)
        self.submitted = time.time_ns()
        self.joined = self.done = 0  # when its first unit joined the batch, and when the last was done


class DecodeLoop(Generic[Model]):
    """A thread that decodes submitted requests. Call ``submit`` from any thread; answers come from another one.

    ``max_queue`` limits the waiting units: a request beyond it is refused, unless the queue is empty. Without
    ``in_flight`` no unit joins until the whole batch is done. ``load`` loads the model, and again after a failed step.
    ``checks``: number of requests that are checked for cancellation every 5 ms; asking Triton takes 0.1 ms each
    (measured). ``report`` is called with the load from time to time, and ``trace`` with the stages of each answered request.
    """

    def __init__(
        self,
        load: Callable[[], Model],
        *,
        max_queue: int,
        in_flight: bool = True,
        checks: int = 1,
        report: Callable[[Load], None] = lambda load: None,
        log_error: Callable[[Exception], None] = lambda error: None,
        trace: Callable[[Any, Sequence[Stage]], None] = lambda client, stages: None,
    ) -> None:
        self.model = load()
        self._load = load
        self._max_queue = max_queue
        self._in_flight = in_flight
        self._checks = checks
        self._report = report
        self._log_error = log_error
        self._trace = trace
        # Shared with the threads that submit, guarded by ``_changed``.
        self._changed = threading.Condition()
        self._inbox: list[_Request] = []
        self._cancelled_requests: list[_Request] = []
        self._waiting = 0
        self._closing = False
        # Used by the loop's thread only.
        self._queue: deque[_Request] = deque()
        self._requests: deque[_Request] = deque()  # the first is the next to be checked for cancellation
        self._request_by_unit: dict[int, _Request] = {}  # by id() of a unit in the decoder
        self._tokens = 0  # of models that failed
        self._cancelled_count = 0
        self._checked = self._reported = 0.0
        self._checking = False  # reset by the clients' thread
        self._clients = ThreadPoolExecutor(1, "clients")
        self._thread = threading.Thread(target=self._run, name="decode-loop")
        self._thread.start()

    def submit(self, client: Client, units: Sequence[Unit]) -> None:
        """Queue ``units``, which join the batch in this order; ``client`` is answered later. Raises QueueFullError."""
        request = _Request(client, units)
        with self._changed:
            if self._waiting and self._waiting + request.left > self._max_queue:
                raise QueueFullError("the queue is full")
            self._waiting += request.left
            self._inbox.append(request)
            self._changed.notify()

    def close(self) -> None:
        """Wait until every submitted request is answered, and end the threads."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()
        self._clients.shutdown()

    def _run(self) -> None:
        while self._receive():
            try:
                self._check_cancelled()
                self._fill_rows()
                done = self.model.decoder.step()
            except Exception as error:
                self._recover(error)
            else:
                self._finish(done)
        self._report_load()

    def _receive(self) -> bool:
        """Take submitted requests, waiting for one if idle. Return False when the loop should end."""
        with self._changed:
            if not self._changed.wait_for(self._has_work, _REPORT_INTERVAL_S):
                self._report_load()
                self._changed.wait_for(self._has_work)
            arrived, self._inbox = self._inbox, []
            cancelled, self._cancelled_requests = self._cancelled_requests, []
        for request in arrived:
            if request.left:
                self._requests.append(request)
                self._queue.append(request)
            else:
                self.call_in_client_thread(self._answer, request)
        for request in cancelled:
            if request in self._requests:
                self._cancelled_count += 1
                self._fail(request, None)
        return bool(self._requests or arrived or cancelled)

    def _has_work(self) -> bool:
        return bool(self._inbox or self._requests or self._closing)

    def _check_cancelled(self) -> None:
        """Check some requests for cancellation and report the load, if it is time to."""
        now = time.monotonic()
        if self._requests and not self._checking and now > self._checked + _CHECK_INTERVAL_S:
            self._checked, self._checking = now, True
            checked = list(islice(self._requests, self._checks))
            self.call_in_client_thread(self._note_cancelled, checked)
            self._requests.rotate(-len(checked))
        if now > self._reported + _REPORT_INTERVAL_S:
            self._reported = now
            self._report_load()

    def _note_cancelled(self, requests: Sequence[_Request]) -> None:
        try:
            cancelled = [request for request in requests if request.client.is_cancelled()]
            if cancelled:
                with self._changed:
                    self._cancelled_requests += cancelled
        finally:
            self._checking = False

    def _fill_rows(self) -> None:
        """Pass waiting units to the decoder while it has free rows."""
        decoder = self.model.decoder
        if decoder.running and not self._in_flight:
            return
        room = decoder.max_rows - decoder.claimed
        fed = 0
        while self._queue and room > 0:
            request = self._queue.popleft()
            unit = request.waiting.popleft()
            request.joined = request.joined or time.time_ns()
            self._request_by_unit[id(unit)] = request
            decoder.add(unit)
            room -= unit.claims
            fed += 1
            if request.waiting:
                self._queue.append(request)
        if fed:
            with self._changed:
                self._waiting -= fed

    def _finish(self, done: Sequence[Unit]) -> None:
        for unit in done:
            request = self._request_by_unit.pop(id(unit), None)
            if request is None:
                continue  # its request failed in an earlier step
            request.left -= 1
            if not request.left:
                request.done = time.time_ns()
                self._requests.remove(request)
                self.call_in_client_thread(self._answer, request)

    def _answer(self, request: _Request) -> None:
        begin = time.time_ns()
        try:
            request.client.answer()
        except Exception as error:
            self._log_error(error)
            request.client.fail(error)
        if request.done:
            self._trace(
                request.client,
                [
                    ("queue", request.submitted, request.joined),
                    ("decode", request.joined, request.done),
                    ("detokenize", begin, time.time_ns()),
                ],
            )

    def _fail(self, request: _Request, error: Exception | None) -> None:
        """Remove a request that is not done, and answer it with an error."""
        with self._changed:
            self._waiting -= len(request.waiting)
        self._requests.remove(request)
        if request.waiting:
            self._queue.remove(request)
        for unit in request.units:
            unit.cancelled = True
            self._request_by_unit.pop(id(unit), None)
        self.call_in_client_thread(request.client.fail, error)

    def _recover(self, error: Exception) -> None:
        """Answer requests with units in the decoder with ``error``, and load a new model."""
        self._log_error(error)
        for request in set(self._request_by_unit.values()):
            self._fail(request, error)
        self._tokens += self.model.decoder.tokens
        try:
            self.model = self._load()
        except Exception as failure:  # the next step fails too, and loads the model again
            self._log_error(failure)

    def _report_load(self) -> None:
        decoder = self.model.decoder
        tokens = self._tokens + decoder.tokens
        load = Load(
            len(decoder.running),
            self._waiting + len(decoder.waiting),
            tokens,
            self._cancelled_count,
            decoder.cache_use,
        )
        self.call_in_client_thread(self._report, load)

    def call_in_client_thread(self, call: Callable[..., None], *arguments: object) -> None:
        """Run a call in the clients' thread. A failure is only logged, so that it does not affect other requests."""

        def logged() -> None:
            try:
                call(*arguments)
            except Exception as failure:
                self._log_error(failure)

        self._clients.submit(logged)
