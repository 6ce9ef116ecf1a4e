"""Run the app with uvicorn in a thread."""

from __future__ import annotations

import asyncio
import math
import socket
import threading
import time

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

from deploykit.errors import ServerError
from deploykit.openai.admission import error_response
from deploykit.openai.certificate import Certificate
from deploykit.openai.errors import ApiError

_HEADER_S = 60.0
_KEEP_ALIVE_S = 75
_START_S = 30.0
_NO_HTTP = ApiError(
    "this is not a request of HTTP/1.1: its first line, a header, its Content-Length or a chunk is malformed"
)


class _Protocol(H11Protocol):
    """HTTP/1.1, which closes a connection on which no whole header arrives within ``_HEADER_S``."""

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect_header()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self._timer is not None:  # it holds the last request
            self._timer.cancel()

    def send_400_response(self, msg: str) -> None:
        """Answer data that is not HTTP, unless an answer has begun, and close the connection."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            answer = error_response("", _NO_HTTP, {"connection": "close"})
            head = h11.Response(status_code=answer.status_code, headers=answer.raw_headers)
            for event in (head, h11.Data(data=bytes(answer.body)), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._expect_header()

    def _expect_header(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self.loop.call_later(_HEADER_S, self._close_without_header, self.cycle)

    def _close_without_header(self, last: RequestResponseCycle | None) -> None:
        """Close the connection if no request arrived after ``last``, which has been answered."""
        if self.cycle is last and (last is None or last.response_complete):
            self.transport.close()


class OpenAIServer:
    """Serves ``app`` on the listening socket ``listener`` while the block runs, with TLS if there is a certificate.

    ``drain`` is the time for open requests when stopping, in seconds. After that they are cancelled.
    """

    def __init__(
        self, app: FastAPI, listener: socket.socket, *, drain: float, certificate: Certificate | None = None
    ) -> None:
        address, port = listener.getsockname()[:2]
        self.url = f"http{'s' if certificate else ''}://{address}:{port}/v1"
        self._listener = listener
        self._server = uvicorn.Server(
            uvicorn.Config(
                app,
                http=_Protocol,
                log_config=None,
                access_log=False,
                ws="none",
                timeout_keep_alive=_KEEP_ALIVE_S,
                timeout_graceful_shutdown=math.ceil(drain),
                ssl_certfile=certificate.certfile if certificate else None,
                ssl_keyfile=certificate.keyfile if certificate else None,
            )
        )
        self._thread = threading.Thread(
            target=self._server.run, args=([listener],), name="deploykit-openai", daemon=True
        )

    def __enter__(self) -> OpenAIServer:
        self._thread.start()
        deadline = time.monotonic() + _START_S
        while not self._server.started:
            if not self._thread.is_alive() or time.monotonic() > deadline:
                raise ServerError("the OpenAI server did not start", "run it again with --debug for details")
            time.sleep(0.01)
        return self

    def __exit__(self, *_: object) -> None:
        """Accept no more connections, and wait for the open requests."""
        self._server.should_exit = True
        self._thread.join()
