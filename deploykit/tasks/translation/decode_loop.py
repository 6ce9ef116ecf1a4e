"""In-flight batching: a decoder in a thread of its own, which requests join and leave between any two steps.

Of the sentences that wait, each request gets one in, in turn: a document does not hold up a line that
comes after it. Clients are spoken to in another thread: Triton takes its time to take an answer, which
those who still run need not wait for.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

from deploykit.errors import QueueFullError
from deploykit.runtime.decoding import Sentence
from deploykit.tasks.translation.predictor import Job, Translator
from deploykit.tasks.translation.translated import Translated

_ASK_S = 0.005  # asking Triton whether a request was cancelled takes 0.1 ms (measured): one request at a time
_REPORT_S = 0.1


class Client(Protocol):
    """Who asked. All are called in one thread, which is not the loop's."""

    def gone(self) -> bool:
        """Whether the answer is wanted no more."""

    def answer(self, translations: Sequence[Translated]) -> None:
        """One for each job."""

    def fail(self, error: Exception | None) -> None:
        """In place of an answer. None: it was gone."""


@dataclass(frozen=True)
class Load:
    """Sentences in the decoder and before it; since the loop began, tokens generated (one a sentence
    and step) and requests that were cancelled."""

    running: int
    waiting: int
    tokens: int
    cancelled: int


class _Request:
    """``jobs`` on their way: ``waiting`` are not with the decoder yet, ``left`` are not done."""

    def __init__(self, client: Client, jobs: Sequence[Job]) -> None:
        self.client = client
        self.jobs = jobs
        self.sentences = [sentence for job in jobs for sentence in job.sentences]
        # Long ones first: short ones fill the room that is left at the end.
        self.waiting = deque(sorted(self.sentences, key=lambda s: -len(s.token_ids)))
        self.left = len(self.sentences)


class DecodeLoop:
    """``submit`` from any thread; clients are answered in one of the loop's own.

    ``max_queue`` bounds the sentences that wait: beyond it a request is refused, unless nothing
    waits. Without ``in_flight`` nothing joins until all that run are done. ``load`` makes the
    translator, again after a step that failed; ``report`` is told the load now and then.
    """

    def __init__(
        self,
        load: Callable[[], Translator],
        *,
        max_queue: int,
        in_flight: bool = True,
        report: Callable[[Load], None] = lambda load: None,
        log_error: Callable[[Exception], None] = lambda error: None,
    ) -> None:
        self.translator = load()
        self._load = load
        self._max_queue = max_queue
        self._in_flight = in_flight
        self._report = report
        self._log_error = log_error
        # Shared with those who submit, under ``_changed``.
        self._changed = threading.Condition()
        self._inbox: list[_Request] = []
        self._gone: list[_Request] = []
        self._waiting = 0
        self._closing = False
        # The loop's own.
        self._queue: deque[_Request] = deque()
        self._requests: deque[_Request] = deque()  # the first is the next to be asked after
        self._request_of: dict[int, _Request] = {}  # by id of a sentence that the decoder has
        self._tokens = self._cancelled = 0
        self._asked = self._reported = 0.0
        self._asking = False  # cleared by the clients' thread
        self._clients = ThreadPoolExecutor(1, "clients")
        self._thread = threading.Thread(target=self._run, name="decode-loop")
        self._thread.start()

    def submit(self, client: Client, jobs: Sequence[Job]) -> None:
        """Translate ``jobs``, and answer ``client``. Raises QueueFullError."""
        request = _Request(client, jobs)
        with self._changed:
            if self._waiting and self._waiting + request.left > self._max_queue:
                raise QueueFullError("the queue of sentences is full")
            self._waiting += request.left
            self._inbox.append(request)
            self._changed.notify()

    def close(self) -> None:
        """Return when everything submitted is answered."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()
        self._clients.shutdown()

    def _run(self) -> None:
        while self._receive():
            try:
                self._ask()
                self._feed()
                done = self.translator.decoder.step()
            except Exception as error:
                self._recover(error)
            else:
                self._tokens += len(self.translator.decoder.running) + len(done)
                self._finish(done)
        self._tell()

    def _receive(self) -> bool:
        """Take in what was submitted, waiting for it if there is nothing to do; False when that is over."""
        with self._changed:
            if not self._changed.wait_for(self._has_work, _REPORT_S):
                self._tell()
                self._changed.wait_for(self._has_work)
            arrived, self._inbox = self._inbox, []
            gone, self._gone = self._gone, []
        for request in arrived:
            if request.left:
                self._requests.append(request)
                self._queue.append(request)
            else:
                self._later(self._answer, request)
        for request in gone:
            if request in self._requests:
                self._cancelled += 1
                self._drop(request, None)
        return bool(self._requests or arrived or gone)

    def _has_work(self) -> bool:
        return bool(self._inbox or self._requests or self._closing)

    def _ask(self) -> None:
        """Have one request asked whether anybody waits for it, and tell the load, now and then."""
        now = time.monotonic()
        if self._requests and not self._asking and now > self._asked + _ASK_S:
            self._asked, self._asking = now, True
            self._later(self._look_after, self._requests[0])
            self._requests.rotate(-1)
        if now > self._reported + _REPORT_S:
            self._reported = now
            self._tell()

    def _look_after(self, request: _Request) -> None:
        try:
            if request.client.gone():
                with self._changed:
                    self._gone.append(request)
        finally:
            self._asking = False

    def _feed(self) -> None:
        """Give the decoder sentences while it has room."""
        decoder = self.translator.decoder
        if decoder.running and not self._in_flight:
            return
        room = decoder.max_rows - decoder.claimed
        fed = 0
        while self._queue and room > 0:
            request = self._queue.popleft()
            sentence = request.waiting.popleft()
            self._request_of[id(sentence)] = request
            decoder.add(sentence)
            room -= sentence.generation.beam_size
            fed += 1
            if request.waiting:
                self._queue.append(request)
        if fed:
            with self._changed:
                self._waiting -= fed

    def _finish(self, done: Sequence[Sentence]) -> None:
        for sentence in done:
            request = self._request_of.pop(id(sentence), None)
            if request is None:
                continue  # left over from a step that failed
            request.left -= 1
            if not request.left:
                self._requests.remove(request)
                self._later(self._answer, request)

    def _answer(self, request: _Request) -> None:
        try:
            request.client.answer([self.translator.result(job) for job in request.jobs])
        except Exception as error:
            self._log_error(error)
            request.client.fail(error)

    def _drop(self, request: _Request, error: Exception | None) -> None:
        """Answer with an error a request that is not done."""
        with self._changed:
            self._waiting -= len(request.waiting)
        self._requests.remove(request)
        if request.waiting:
            self._queue.remove(request)
        for sentence in request.sentences:
            sentence.cancelled = True
            self._request_of.pop(id(sentence), None)
        self._later(request.client.fail, error)

    def _recover(self, error: Exception) -> None:
        """Answer with ``error`` the requests that the decoder had a part of, and begin with a new one."""
        self._log_error(error)
        for request in set(self._request_of.values()):
            self._drop(request, error)
        try:
            self.translator = self._load()
        except Exception as failure:  # the next step fails then, and tries again
            self._log_error(failure)

    def _tell(self) -> None:
        decoder = self.translator.decoder
        load = Load(len(decoder.running), self._waiting + len(decoder.waiting), self._tokens, self._cancelled)
        self._later(self._report, load)

    def _later(self, call: Callable[..., None], *arguments: object) -> None:
        """Have the clients' thread call it. Should that fail nobody is left to tell, and the others must not suffer."""

        def logged() -> None:
            try:
                call(*arguments)
            except Exception as failure:
                self._log_error(failure)

        self._clients.submit(logged)
