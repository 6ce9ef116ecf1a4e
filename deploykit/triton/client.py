"""A classifier on a running server: the same interface as one in this process."""

from __future__ import annotations

import random
import re
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import tritonclient.http as triton
from numpy.typing import NDArray
from tritonclient.utils import InferenceServerException

from deploykit.errors import DeploykitError, RequestError, ServerError, UsageError
from deploykit.tasks import Task
from deploykit.triton.repository import check_name, task_of_parameters

DEFAULT_URL = "http://127.0.0.1:8000"
_MAX_REQUEST_BYTES = 8 << 20  # well below Triton's limit of 64 MiB for a request's body
_SURROGATE = re.compile(r"[\ud800-\udfff]")
# What Triton says while a model whose process died is being loaded again.
_RELOADING = re.compile(r"is not healthy|is not found|no available versions|is not ready|unloaded|UNAVAILABLE")


@dataclass(frozen=True)
class RowResult:
    """The answer to one text. ``error`` is empty, or says why ``label`` is empty and ``scores`` 0."""

    label: str
    scores: NDArray[np.float32]
    error: str


class ServedClassifier:
    """The model ``name`` on the Triton server at ``url``; satisfies ``Predictor``.

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
        self._connections = threading.local()  # a tritonclient belongs to the thread that made it
        config = self._ask(lambda client: client.get_model_config(name), patience=0.0)
        self.task: Task = self._read_task(config)
        self.max_batch_size = max(1, int(config.get("max_batch_size", 1)))
        self._pool = ThreadPoolExecutor(in_flight, "deploykit-client")

    def scores(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Probabilities, float32 [texts, labels]. Raises RequestError if any text has none."""
        rows = self.predict_rows(texts)
        for number, row in enumerate(rows):
            if row.error:
                raise RequestError(f"text {number}: {row.error}", 400, "remove that text, or correct it")
        return np.array([row.scores for row in rows], np.float32).reshape(len(rows), len(self.task.labels))

    def predict_rows(self, texts: Sequence[str]) -> list[RowResult]:
        """One result for each text, in their order; a text that the model refuses fails alone."""
        raw = [_SURROGATE.sub("\ufffd", text).encode() for text in texts]
        answers = self._pool.map(self._infer, self._chunks(raw))
        return [row for rows in answers for row in rows]

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)

    def _chunks(self, raw: Sequence[bytes]) -> Iterator[list[bytes]]:
        chunk: list[bytes] = []
        size = 0
        for text in raw:
            if chunk and (len(chunk) == self.max_batch_size or size + len(text) > _MAX_REQUEST_BYTES):
                yield chunk
                chunk, size = [], 0
            chunk.append(text)
            size += len(text)
        if chunk:
            yield chunk

    def _infer(self, chunk: list[bytes]) -> list[RowResult]:
        text = triton.InferInput("TEXT", [len(chunk), 1], "BYTES")
        text.set_data_from_numpy(np.array(chunk, np.object_).reshape(-1, 1))
        outputs = [triton.InferRequestedOutput(name) for name in ("LABEL", "SCORES", "ERROR")]
        try:
            answer = self._ask(
                lambda client: client.infer(self._name, [text], outputs=outputs), patience=self._patience
            )
        except RequestError as error:
            if error.status != 400:
                raise
            if len(chunk) == 1:
                nothing = np.zeros(len(self.task.labels), np.float32)
                return [RowResult("", nothing, error.message.removeprefix("row 0 of TEXT: "))]
            # Every row is bad, and the refusal names the first only.
            return [row for one in chunk for row in self._infer([one])]
        labels, scores, errors = (answer.as_numpy(name) for name in ("LABEL", "SCORES", "ERROR"))
        return [
            RowResult(label.decode(), row, error.decode())
            for label, row, error in zip(labels.reshape(-1), scores, errors.reshape(-1))
        ]

    def _ask(self, request: Any, *, patience: float) -> Any:
        """Send ``request(client)`` until it is answered, refused for good, or ``patience`` seconds are over."""
        deadline = time.monotonic() + patience
        pause = 0.05
        while True:
            try:
                return request(self._client())
            except InferenceServerException as error:
                status, message = _status(error), _plain(error.message() or "")
                busy = status == 503 or (status in (400, 404, 500) and _RELOADING.search(message) is not None)
                if not busy or time.monotonic() > deadline:
                    raise self._refusal(status, message) from None
            except TimeoutError:
                self._connections.__dict__.clear()
                raise ServerError(
                    f"no answer from {self._url} within {self._timeout:g} s", "see the server's log, or try later"
                ) from None
            except (OSError, EOFError) as error:
                self._connections.__dict__.clear()
                raise ServerError(
                    f"no server answers at {self._url} ({_reason(error)})",
                    "start one with: deploykit serve; or pass its address with --url",
                ) from None
            except DeploykitError:
                raise
            except Exception as error:  # the HTTP library's exceptions, and JSON's, share no base
                self._connections.__dict__.clear()
                raise ServerError(
                    f"{self._url} answers, but not as a Triton server does ({_reason(error)})",
                    "pass the server's HTTP address (not its gRPC or metrics port) with --url",
                ) from None
            time.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(2 * pause, 1.0)

    def _client(self) -> Any:
        client = getattr(self._connections, "client", None)
        if client is None:
            client = triton.InferenceServerClient(
                self._address, ssl=self._ssl, connection_timeout=min(10.0, self._timeout), network_timeout=self._timeout
            )
            self._connections.client = client
        return client

    def _refusal(self, status: int, message: str) -> ServerError:
        where = f"model {self._name} at {self._url}"
        if status == 503:
            return RequestError(f"{where}: is overloaded: {message}", 503, "send fewer requests at once, or try later")
        if status == 404 or "unknown model" in message:
            return RequestError(
                f"{where}: no such model on that server", 404, "deploykit serve prints the names of its models"
            )
        if status == 0 or status in (401, 403, 405, 502, 504):
            return ServerError(
                f"{self._url} answers, but not as a Triton server does (HTTP status {status})",
                "pass the server's HTTP address (not its gRPC or metrics port) with --url",
            )
        if status == 400:
            return RequestError(message, 400, "correct the request")
        return RequestError(f"{where}: {message}", status, "see the server's log")

    def _read_task(self, config: Any) -> Task:
        try:
            parameters = {key: value["string_value"] for key, value in config["parameters"].items()}
            return task_of_parameters(parameters["labels"], parameters["task"])
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise RequestError(
                f"model {self._name} at {self._url}: was not packaged by deploykit: its config has no task",
                400,
                "name a model that deploykit package wrote",
            ) from error


def open_served(name: str, url: str = DEFAULT_URL) -> ServedClassifier:
    """The model ``name`` on the server at ``url``, by what its config says it does."""
    return ServedClassifier(name, url)


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


def _status(error: InferenceServerException) -> int:
    text = str(error.status() or "")
    return int(text) if text.isdigit() else 0


def _plain(message: str) -> str:
    """Triton's message without the request id that nobody set."""
    return message.removeprefix("[request id: <id_unknown>] ").strip()


def _reason(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
