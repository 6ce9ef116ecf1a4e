"""Answer requests to models of the other tasks: a list of texts in, an answer to each out."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any

from pydantic import Field, field_validator

from deploykit.errors import RequestError, ServerError, UsageError
from deploykit.openai.errors import PATIENCE_S, PAUSE_S, ApiError, overloaded, restarting
from deploykit.openai.read_body import Body
from deploykit.tasks.answering import AnsweredRow, answer_rows, rows_of
from deploykit.tasks.protocol import Predictor

MAX_TEXTS = 2048
_THREADS = 16
_MOST_WAITING = 256


class TextsBody(Body):
    """Texts for a model; a pair of texts is one input of a model of pairs."""

    model: str = Field(min_length=1, max_length=256)
    input: list[str | Annotated[list[str], Field(min_length=2, max_length=2)]] = Field(
        min_length=1, max_length=MAX_TEXTS
    )

    @field_validator("input", mode="before", json_schema_input_type=str | list[str | list[str]])
    @classmethod
    def _texts(cls, value: Any) -> Any:
        texts = [value] if isinstance(value, str) else value
        for index, text in enumerate(texts if isinstance(texts, list) else ()):
            parts = text if isinstance(text, list) and len(text) == 2 else [text]
            if not all(isinstance(part, str) for part in parts):
                raise ValueError(f"item {index} should be a text, or a pair of texts")
        return texts


class Predictors:
    """Clients of served models. ``open_model`` connects to the model of a name.

    A client is used by one thread at a time, and kept for the next request.
    """

    def __init__(self, open_model: Callable[[str], Predictor]) -> None:
        self._open = open_model
        self._idle: dict[str, deque[Predictor]] = {}
        self._threads = ThreadPoolExecutor(_THREADS, "deploykit-openai")
        self._room = threading.BoundedSemaphore(_MOST_WAITING)

    async def answer(self, body: TextsBody) -> dict[str, Any]:
        """Return the response: an object for each text, with the columns of its answer, or an ``error``.

        Raises ApiError if the only text is refused, if too many requests wait, or if the server is lost.
        """
        if not self._room.acquire(blocking=False):
            raise overloaded("too many requests wait")
        texts = [text if isinstance(text, str) else (text[0], text[1]) for text in body.input]
        work = self._threads.submit(contextvars.copy_context().run, self._answer, body.model, texts)
        # It counts until its thread is free again, which may be after the request's time is over.
        work.add_done_callback(lambda _: self._room.release())
        rows = await asyncio.wrap_future(work)
        if len(rows) == 1 and rows[0].error:
            raise ApiError(f"input: {rows[0].error}", param="input", code="invalid_value")
        data = [
            {"index": i, "error": row.error} if row.answer is None else {"index": i, **row.answer.columns}
            for i, row in enumerate(rows)
        ]
        return {"object": "list", "model": body.model, "data": data}

    def close(self) -> None:
        """Wait for requests, and close all connections."""
        self._threads.shutdown()
        for clients in self._idle.values():
            for client in clients:
                client.close()
        self._idle.clear()

    def _answer(self, model: str, texts: Sequence[str | tuple[str, str]]) -> list[AnsweredRow]:
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                return self._try(model, texts)
            except UsageError as error:
                raise ApiError(f"input: {error.message}", param="input", code="invalid_value") from error
            except RequestError as error:
                if error.status == 503:
                    raise overloaded(error.message) from error
                if error.status == 400:
                    raise ApiError(error.message, code="invalid_value") from error
                fault: ServerError = error
            except ServerError as error:
                fault = error
            if time.monotonic() > deadline:
                raise restarting(fault.message) from fault
            time.sleep(PAUSE_S)

    def _try(self, model: str, texts: Sequence[str | tuple[str, str]]) -> list[AnsweredRow]:
        idle = self._idle.setdefault(model, deque())
        try:
            client = idle.pop()
        except IndexError:
            client = self._open(model)
        try:
            rows = answer_rows(client, rows_of(texts, client.task))
        except BaseException:
            with contextlib.suppress(Exception):
                client.close()
            raise
        idle.append(client)
        return rows
