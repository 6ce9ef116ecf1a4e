"""Connect to a model on a running Triton server: what the clients of every task share."""

from __future__ import annotations

import http.client
import json
import random
import re
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar
from urllib.parse import quote, urlsplit

import numpy as np
import tritonclient.http as triton
from numpy.typing import NDArray

from deploykit.errors import DeploykitError, RequestError, ServerError, UsageError
from deploykit.tasks.protocol import TaskFacts
from deploykit.tasks.registry import task_of_parameters

DEFAULT_URL = "http://127.0.0.1:8000"
_MAX_REQUEST_BYTES = 8 << 20  # well below Triton's limit of 64 MiB for a request's body
_FIRST_ROW = re.compile(r"row 0 of [A-Z]+: ")  # begins the refusal of a request without a good row
_SURROGATE = re.compile(r"[\ud800-\udfff]")
# What Triton says while a model whose process died is being loaded again.
_RELOADING = re.compile(r"is not healthy|is not found|no available versions|is not ready|unloaded|UNAVAILABLE")


Row = TypeVar("Row")


class _Connection:
    """One keep-alive connection, for any thread: tritonclient's belongs to the one that made it, to be closed as well."""

    def __init__(self, address: str, tls: bool, timeout: float) -> None:
        host, _, path = address.partition("/")
        self._path = f"/{path}" if path else ""
        kind = http.client.HTTPSConnection if tls else http.client.HTTPConnection
        self._connection = kind(host, timeout=min(10.0, timeout))
        self._connection.connect()
        self._connection.sock.settimeout(timeout)

    def send(self, method: str, path: str, body: bytes, json_size: int | None) -> tuple[int, int | None, bytes]:
        """See ``ServedModel._send``."""
        headers = {} if json_size is None else {"Inference-Header-Content-Length": str(json_size)}
        self._connection.request(method, f"{self._path}{path}", body, headers)
        response = self._connection.getresponse()
        size = response.headers.get("Inference-Header-Content-Length")
        return response.status, None if size is None else int(size), response.read()

    @property
    def kept(self) -> bool:
        """Whether the server left it open."""
        return self._connection.sock is not None

    def close(self) -> None:
        self._connection.close()


class ServedModel:
    """The model ``name`` on the Triton server at ``url``: what clients of every task do alike.

    ``timeout`` seconds bound one answer. A full queue, or a model that is being loaded again, is
    tried again for ``patience`` seconds. Not for use from several threads at once.
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
            config = self._ask("GET", "config", patience=0.0)
            self.facts: TaskFacts = self._read_task(config)
        except BaseException:
            self.close()
            raise
        self.max_batch_size = max(1, int(config.get("max_batch_size", 1)))

    def close(self) -> None:
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
        """What ``infer`` says of each text, in their order; ``failed(error)`` for one that the model refuses.

        Several requests of many texts, of ``most_bytes`` or of one text each, are under way at once.
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
                # Every row is bad, and the refusal names the first only.
                return [row for one in chunk for row in ask([one])]

        raw = [_SURROGATE.sub("\ufffd", text).encode() for text in texts]
        answers = self._pool.map(ask, self._chunks(raw, most_bytes))
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
        """The outputs ``names`` for the texts of each input, a row each."""
        tensors = []
        for name, texts in inputs.items():
            tensors.append(triton.InferInput(name, [len(texts), 1], "BYTES"))
            tensors[-1].set_data_from_numpy(np.array(texts, np.object_).reshape(-1, 1))
        outputs = [triton.InferRequestedOutput(name) for name in names]
        body, json_size = triton.InferenceServerClient.generate_request_body(
            tensors, outputs=outputs, parameters=parameters or None
        )
        answer = self._ask("POST", "infer", body, json_size, patience=self._patience)
        return [answer.as_numpy(name) for name in names]

    def _ask(self, method: str, what: str, body: bytes = b"", json_size: int | None = None, *, patience: float) -> Any:
        """What the server says of ``what`` of this model: an InferResult, or without ``json_size`` JSON.

        Asked until it is answered, refused for good, or ``patience`` seconds are over.
        """
        path = f"/v2/models/{quote(self._name)}/{what}"
        deadline = time.monotonic() + patience
        pause = 0.05
        while True:
            try:
                status, header_size, answer = self._send(method, path, body, json_size)
                if status == 200:
                    if json_size is None:
                        return json.loads(answer)
                    return triton.InferenceServerClient.parse_response_body(answer, header_length=header_size)
            except TimeoutError:
                raise ServerError(
                    f"no answer from {self._url} within {self._timeout:g} s", "see the server's log, or try later"
                ) from None
            except OSError as error:
                raise ServerError(
                    f"no server answers at {self._url} ({_reason(error)})",
                    "start one with: deploykit serve; or pass its address with --url",
                ) from None
            except Exception as error:  # HTTP's exceptions, JSON's and those of tritonclient share no base
                raise self._not_triton(_reason(error)) from None
            message = error_text(answer).removeprefix("[request id: <id_unknown>] ").strip()  # an id that nobody set
            busy = status == 503 or (status in (400, 404, 500) and _RELOADING.search(message) is not None)
            if not busy or time.monotonic() > deadline:
                raise self._refusal(status, message)
            time.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(2 * pause, 1.0)

    def _send(self, method: str, path: str, body: bytes, json_size: int | None) -> tuple[int, int | None, bytes]:
        """The answer's status, the size of its JSON if more follows, and its body."""
        try:
            connection, used = self._idle.pop(), True
        except IndexError:
            connection, used = _Connection(self._address, self._ssl, self._timeout), False
        try:
            answer = connection.send(method, path, body, json_size)
        except BaseException as error:
            connection.close()
            if used and isinstance(error, ConnectionError):  # the server may close what was idle
                return self._send(method, path, body, json_size)
            raise
        if connection.kept:
            self._idle.append(connection)
        return answer

    def _not_triton(self, reason: str) -> ServerError:
        return ServerError(
            f"{self._url} answers, but not as a Triton server does ({reason})",
            "pass the server's HTTP address (not its gRPC or metrics port) with --url",
        )

    def _refusal(self, status: int, message: str) -> ServerError:
        where = f"model {self._name} at {self._url}"
        if status == 503:
            return RequestError(f"{where}: is overloaded: {message}", 503, "send fewer requests at once, or try later")
        if status == 404 or "unknown model" in message:
            return RequestError(
                f"{where}: no such model on that server", 404, "deploykit serve prints the names of its models"
            )
        if status in (401, 403, 405, 502, 504):
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
                f"model {self._name} at {self._url}: was not packaged by deploykit: its config has no task",
                400,
                "name a model that deploykit package wrote",
            ) from error
        if "streams" in parameters:
            raise UsageError(
                f"model {self._name} sends sentences one by one, to a gRPC stream", f"name {parameters['streams']}"
            )
        return task


def parse_url(url: str) -> tuple[str, bool]:
    """(``host:port`` and any path, whether it is https) of a server's HTTP address.

    ``host:port`` and ``http://host:port`` are the same. Raises UsageError.
    """
    try:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        port, host = parts.port, parts.hostname
    except ValueError as error:
        raise UsageError(f"{url!r} is not an address: {error}", f"write it as {DEFAULT_URL}") from None
    if parts.scheme not in ("http", "https") or not host or parts.query or parts.fragment or re.search(r"\s", url):
        raise UsageError(f"{url!r} is not the HTTP address of a server", f"write it as {DEFAULT_URL}")
    if port is None:
        port = {"http": 80, "https": 443}[parts.scheme] if "://" in url else 8000
    name = f"[{host}]" if ":" in host else host
    return f"{name}:{port}{parts.path.rstrip('/')}", parts.scheme == "https"


def error_text(answer: bytes) -> str:
    """What the body of a refusal says: Triton's message, or the beginning of what a proxy sent."""
    try:
        return str(json.loads(answer)["error"])
    except (ValueError, LookupError, TypeError):
        return answer[:200].decode(errors="replace")


def require_all(errors: Sequence[str]) -> None:
    for number, error in enumerate(errors):
        if error:
            raise RequestError(f"text {number}: {error}", 400, "remove that text, or correct it")


def _reason(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*")


def check_name(name: str) -> None:
    """Raise UsageError unless ``name`` can be a folder and a part of a URL."""
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"model name {name!r} is not allowed", "use letters, digits, _ . and - only, not beginning with a dot"
        )
