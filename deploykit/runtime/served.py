"""Connect to a model on a running Triton server: the base of all tasks' clients."""

from __future__ import annotations

import contextlib
import contextvars
import http.client
import json
import os
import random
import re
import ssl
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar
from urllib.parse import quote, urlsplit

import numpy as np
import tritonclient.http as triton
from numpy.typing import NDArray

from deploykit.artifacts import digest_of
from deploykit.errors import DeploykitError, RequestError, ServerError, UsageError
from deploykit.runtime.serving_settings import API_KEY_VARIABLE, check_name
from deploykit.runtime.serving_settings import DEFAULT_URL as DEFAULT_URL
from deploykit.runtime.tracing import trace_headers
from deploykit.runtime.triton_messages import RELOADING
from deploykit.tasks.protocol import TaskFacts
from deploykit.tasks.registry import task_of_parameters

_MAX_REQUEST_BYTES = 4 << 20  # the whole request stays below the OpenAI port's limit of 8 MiB
_FIRST_ROW = re.compile(r"row 0 of [A-Z]+: ")  # prefix of the error for a request without a valid row
_SURROGATE = re.compile(r"[\ud800-\udfff]")
LOST = (400, 404, 500, 503)
"""HTTP statuses of errors that a model may cause while it is loaded again."""
_MOST_LOST = 2
"""Number of servers that may be lost during one request, because the request itself may have ended them."""
_PAUSE_S = 0.2
"""Pause before a stream is requested again."""


Row = TypeVar("Row")


class _Connection:
    """One keep-alive HTTP connection that any thread may use and close.

    A connection of tritonclient belongs to the thread that made it.
    """

    def __init__(self, address: str, tls: bool, timeout: float) -> None:
        host, _, path = address.partition("/")
        self._path = f"/{path}" if path else ""
        keys = os.environ.get(API_KEY_VARIABLE, "").split()
        self._key = {"Authorization": f"Bearer {keys[0]}"} if keys else {}
        kind = http.client.HTTPSConnection if tls else http.client.HTTPConnection
        self._connection = kind(host, timeout=min(10.0, timeout))
        self._connection.connect()
        self._connection.sock.settimeout(timeout)

    def send(self, method: str, path: str, body: bytes, json_size: int | None) -> tuple[int, int | None, bytes]:
        """Send a request. See ``ServedModel._send``."""
        headers = {} if json_size is None else {"Inference-Header-Content-Length": str(json_size)}
        self._connection.request(method, f"{self._path}{path}", body, {**self._key, **trace_headers(), **headers})
        response = self._connection.getresponse()
        size = response.headers.get("Inference-Header-Content-Length")
        return response.status, None if size is None else int(size), response.read()

    def post(self, path: str, body: bytes) -> http.client.HTTPResponse:
        """Send a request whose answer is read as a stream."""
        self._connection.request(
            "POST", f"{self._path}{path}", body, {**self._key, **trace_headers(), "Accept": "text/event-stream"}
        )
        return self._connection.getresponse()

    @property
    def kept(self) -> bool:
        """Whether the server left the connection open."""
        return self._connection.sock is not None

    def close(self) -> None:
        self._connection.close()


class ServedModel:
    """The model ``name`` on the Triton server at ``url``: the base of every task's client.

    ``timeout`` is the limit for one answer, in seconds. If the queue is full, or the model or the server is being started
    again, requests are retried for ``patience`` seconds. Not for use from several threads at once.
    """

    def __init__(
        self, name: str, url: str = DEFAULT_URL, *, timeout: float = 60.0, patience: float = 20.0, in_flight: int = 4
    ) -> None:
        check_name(name)
        self._name = name
        self._address, self._ssl = parse_url(url)
        self._url = url
        self._timeout = timeout
        self._patience = patience
        self._idle: deque[_Connection] = deque()
        self._pool = ThreadPoolExecutor(in_flight, "deploykit-client")
        try:
            config = self._request("GET", "config", patience=0.0)
            self.facts: TaskFacts = self._read_task(config)
        except BaseException:
            self.close()
            raise
        self.max_batch_size = max(1, int(config.get("max_batch_size", 1)))
        self._config = config

    def identity(self) -> str:
        """Return a digest that identifies the served model: its address, configuration and loaded versions."""
        loaded = self._request("GET", "stats", patience=self._patience)
        return digest_of(self._url, self._config, [model["version"] for model in loaded["model_stats"]])

    def close(self) -> None:
        """Close all connections."""
        self._pool.shutdown(cancel_futures=True)
        while self._idle:
            self._idle.pop().close()

    def _rows(
        self,
        texts: Sequence[str],
        infer: Callable[[list[bytes]], list[Row]],
        failed: Callable[[str], Row],
        *,
        most_bytes: int = _MAX_REQUEST_BYTES,
    ) -> list[Row]:
        """Return the result of ``infer`` for each text, in order; ``failed(error)`` for a text that the model refuses.

        Several requests are in flight at once, each of up to ``most_bytes`` or of one text.
        """

        def ask(chunk: list[bytes]) -> list[Row]:
            try:
                return infer(chunk)
            except RequestError as error:
                found = _FIRST_ROW.match(error.message)
                if error.status != 400 or found is None:
                    raise
                if len(chunk) == 1:
                    return [failed(error.message[found.end() :])]
                # All rows were refused, but the error names only the first.
                return [row for one in chunk for row in ask([one])]

        raw = [_SURROGATE.sub("\ufffd", text).encode() for text in texts]
        # Each request belongs to the caller's trace.
        contexts = iter(contextvars.copy_context, None)  # without end
        answers = self._pool.map(lambda chunk, own: own.run(ask, chunk), self._chunks(raw, most_bytes), contexts)
        return [row for rows in answers for row in rows]

    def _chunks(self, raw: Sequence[bytes], most_bytes: int) -> Iterator[list[bytes]]:
        chunk: list[bytes] = []
        size = 0
        for text in raw:
            if chunk and (len(chunk) == self.max_batch_size or size + len(text) > most_bytes):
                yield chunk
                chunk, size = [], 0
            chunk.append(text)
            size += len(text)
        if chunk:
            yield chunk

    def _infer(
        self, inputs: Mapping[str, Sequence[bytes]], names: Sequence[str], parameters: Mapping[str, Any] | None = None
    ) -> list[NDArray[Any]]:
        """Return the outputs ``names`` for the texts of each input, one row per text."""
        tensors = []
        for name, texts in inputs.items():
            tensors.append(triton.InferInput(name, [len(texts), 1], "BYTES"))
            tensors[-1].set_data_from_numpy(np.array(texts, np.object_).reshape(-1, 1))
        outputs = [triton.InferRequestedOutput(name) for name in names]
        body, json_size = triton.InferenceServerClient.generate_request_body(
            tensors, outputs=outputs, parameters=parameters or None
        )
        answer = self._request("POST", "infer", body, json_size, patience=self._patience)
        return [answer.as_numpy(name) for name in names]

    def _request(
        self, method: str, what: str, body: bytes = b"", json_size: int | None = None, *, patience: float
    ) -> Any:
        """Request ``what`` of this model. Returns an InferResult, or parsed JSON if ``json_size`` is None.

        Retries until the request is answered or finally refused, or ``patience`` seconds are over: ``serve`` restarts a
        server that died. A request that two servers did not survive is not sent to a third.
        """
        path = f"/v2/models/{quote(self._name)}/{what}"
        deadline = time.monotonic() + patience
        pause, lost = 0.05, 0
        while True:
            try:
                status, header_size, answer = self._send(method, path, body, json_size)
                if status == 200:
                    if json_size is None:
                        return json.loads(answer)
                    return triton.InferenceServerClient.parse_response_body(answer, header_length=header_size)
            except TimeoutError:
                raise ServerError(
                    f"no answer from {self._url} within {self._timeout:g} s", "see the server's log, or try again later"
                ) from None
            except ssl.SSLCertVerificationError as error:
                raise ServerError(
                    f"{self._url}: its certificate is not trusted ({error.verify_message})",
                    "set SSL_CERT_FILE to the certificate of the authority that signed it, or to the certificate itself if it is self-signed",
                ) from None
            except (OSError, http.client.IncompleteRead) as error:
                lost += not isinstance(error, ConnectionRefusedError)
                if lost >= _MOST_LOST or time.monotonic() >= deadline:
                    raise ServerError(
                        f"no server answers at {self._url} ({_reason(error)})",
                        "start one with deploykit serve, or pass the server's address with --url",
                    ) from None
            except Exception as error:  # exceptions of http, json and tritonclient have no common base
                raise self._not_triton(_reason(error)) from None
            else:
                message = (
                    error_text(answer).removeprefix("[request id: <id_unknown>] ").strip()
                )  # Triton's prefix for a request without an id
                if not _busy(status, message) or time.monotonic() >= deadline:
                    raise self._refusal(status, message)
            time.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(2 * pause, 1.0)

    def _events(self, what: str, body: bytes) -> Iterator[Any]:
        """Request a stream of this model, and yield its events, parsed JSON. Closing the generator closes the connection, which cancels
        an unfinished request. Until the first event it retries, as ``_request`` does. Raises ServerError.

        Events may be missing at the end: http.client does not report a stream that breaks off.
        """
        deadline = time.monotonic() + self._patience
        lost, begun = 0, False
        while True:
            try:
                with contextlib.closing(self._stream(what, body)) as events:
                    for event in events:
                        begun = True
                        yield event
                return
            except _RefusedError as refused:
                if begun or not _busy(refused.status, refused.message) or time.monotonic() >= deadline:
                    raise self._refusal(refused.status, refused.message) from None
            except (OSError, http.client.HTTPException) as error:
                lost += not isinstance(error, ConnectionRefusedError)
                if begun or lost >= _MOST_LOST or time.monotonic() >= deadline:
                    raise ServerError(
                        f"the server at {self._url} ended the stream ({_reason(error)})",
                        "see the server's log, or try again",
                    ) from None
            time.sleep(_PAUSE_S)

    def _stream(self, what: str, body: bytes) -> Generator[Any, None, None]:
        """Request a stream once, and yield its events. Raises _RefusedError, or the error of a lost connection, also if no event
        arrived."""
        with contextlib.closing(_Connection(self._address, self._ssl, self._timeout)) as connection:
            response = connection.post(f"/v2/models/{quote(self._name)}/{what}", body)
            if response.status != 200:
                raise _RefusedError(response.status, error_text(response.read()))
            empty = True
            for line in response:
                if line.startswith(b"data: "):
                    event = json.loads(line[6:])
                    if "error" in event:
                        raise _RefusedError(400, str(event["error"]))
                    empty = False
                    yield event
            if empty:
                raise http.client.IncompleteRead(b"")

    def _send(self, method: str, path: str, body: bytes, json_size: int | None) -> tuple[int, int | None, bytes]:
        """Send one request. Returns the status, the size of the JSON part if a binary part follows, and the body."""
        try:
            connection, used = self._idle.pop(), True
        except IndexError:
            connection, used = _Connection(self._address, self._ssl, self._timeout), False
        try:
            answer = connection.send(method, path, body, json_size)
        except BaseException as error:
            connection.close()
            if used and isinstance(error, ConnectionError):  # the server may have closed an idle connection
                return self._send(method, path, body, json_size)
            raise
        if connection.kept:
            self._idle.append(connection)
        return answer

    def _not_triton(self, reason: str) -> ServerError:
        return ServerError(
            f"{self._url} is not a Triton server ({reason})",
            "pass the server's HTTP address (not its gRPC or metrics port) with --url",
        )

    def _refusal(self, status: int, message: str) -> ServerError:
        where = f"model {self._name} at {self._url}"
        if status in (429, 503):
            return RequestError(
                f"{where}: overloaded: {message}", 503, "send fewer requests at once, or try again later"
            )
        if status == 404 or "unknown model" in message:
            return RequestError(
                f"{where}: the server has no such model", 404, "use a name that deploykit serve printed when it started"
            )
        if status == 401:
            return RequestError(
                f"{where}: the server needs an API key",
                401,
                f"set {API_KEY_VARIABLE} to one that its operator gave you",
            )
        if status in (403, 405, 502, 504):
            return self._not_triton(f"HTTP status {status}")
        if status == 400:
            return RequestError(message, 400, "correct the request")
        return RequestError(f"{where}: {message}", status, "see the server's log")

    def _read_task(self, config: Any) -> TaskFacts:
        try:
            parameters = {key: value["string_value"] for key, value in config["parameters"].items()}
            task = task_of_parameters(parameters)
        except (KeyError, TypeError, AttributeError, ValueError, DeploykitError) as error:
            raise RequestError(
                f"model {self._name} at {self._url} was not packaged by deploykit: its config has no task",
                400,
                "name a model that deploykit package wrote",
            ) from error
        if "streams" in parameters:
            raise UsageError(f"model {self._name} answers gRPC streams only", f"use the model {parameters['streams']}")
        return task


def parse_url(url: str) -> tuple[str, bool]:
    """Split a server's HTTP address into ``host:port`` with the path, and whether it is https.

    ``host:port`` and ``http://host:port`` mean the same. Raises UsageError.
    """
    try:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        port, host = parts.port, parts.hostname
    except ValueError as error:
        raise UsageError(f"{url!r} is not an address: {error}", f"write it like {DEFAULT_URL}") from None
    if parts.scheme not in ("http", "https") or not host or parts.query or parts.fragment or re.search(r"\s", url):
        raise UsageError(f"{url!r} is not an HTTP address", f"write it like {DEFAULT_URL}")
    if port is None:
        port = {"http": 80, "https": 443}[parts.scheme] if "://" in url else 8000
    name = f"[{host}]" if ":" in host else host
    return f"{name}:{port}{parts.path.rstrip('/')}", parts.scheme == "https"


def error_text(answer: bytes) -> str:
    """Return the message of an error response: Triton's (an event, if a stream was requested), or the beginning of a
    proxy's."""
    try:
        return str(json.loads(answer.removeprefix(b"data: "))["error"])
    except (ValueError, LookupError, TypeError):
        return answer[:200].decode(errors="replace")


def require_all(errors: Sequence[str]) -> None:
    """Raise RequestError for the first text that has an error. It names the text if there are several."""
    for number, error in enumerate(errors):
        if error:
            name = f"text {number}: " if len(errors) > 1 else ""
            raise RequestError(f"{name}{error}", 400, "remove that text, or correct it")


class _RefusedError(DeploykitError):
    """An answer's status and message in place of events."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def _busy(status: int, message: str) -> bool:
    """Return whether a retry of the same request may succeed."""
    return status in (429, 503) or (status in LOST and RELOADING.search(message) is not None)


def _reason(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
