"""Run the app with uvicorn in a thread."""

from __future__ import annotations

import math
import socket
import threading
import time

import uvicorn
from fastapi import FastAPI

from deploykit.errors import ServerError

_KEEP_ALIVE_S = 75
_START_S = 30.0


class OpenAIServer:
    """Serves ``app`` on the listening socket ``listener`` while the block runs.

    ``drain`` is the time for open requests when stopping, in seconds. After that they are cancelled.
    """

    def __init__(self, app: FastAPI, listener: socket.socket, *, drain: float) -> None:
        address, port = listener.getsockname()[:2]
        self.url = f"http://{address}:{port}/v1"
        self._listener = listener
        self._server = uvicorn.Server(
            uvicorn.Config(
                app,
                log_config=None,
                access_log=False,
                ws="none",
                timeout_keep_alive=_KEEP_ALIVE_S,
                timeout_graceful_shutdown=math.ceil(drain),
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
