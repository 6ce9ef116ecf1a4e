"""Admit requests: check the key, and hold the caller to its limits of time and of open requests.

The other limits are checked where the body is read.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deploykit.openai.answers import cancel, event
from deploykit.openai.errors import ApiError
from deploykit.openai.limits import Caller, Keys

HEALTH = "/health"
_OPEN = (HEALTH, "/v2/health/live", "/v2/health/ready")
_CALLER = "deploykit.caller"
_LAST_EVENT_S = 1.0


def caller_of(request: Request) -> Caller:
    """Return who sends ``request``."""
    caller: Caller = request.scope[_CALLER]
    return caller


def json_response(content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    body = json.dumps(content, ensure_ascii=False, separators=(",", ":"), default=float).encode(errors="replace")
    return Response(body, status, media_type="application/json", headers=headers)


def error_response(path: str, error: ApiError, headers: Mapping[str, str] | None = None) -> Response:
    """Return the response for ``error``: in OpenAI's form, or in KServe's on the routes /v2."""
    headers = dict(headers or {})
    if error.status in (429, 503):
        headers["retry-after"] = "1"
    if error.status in (408, 413):  # the rest of the body is not read
        headers["connection"] = "close"
    body = {"error": error.message} if is_kserve(path) else error.body()
    return json_response(body, error.status, headers)


def is_kserve(path: str) -> bool:
    """Return whether ``path`` is a route of Triton's API."""
    return path == "/v2" or path.startswith("/v2/")


class Front:
    """Pass requests on to ``app`` that ``keys`` admit. The routes of health need no key."""

    def __init__(self, app: ASGIApp, keys: Keys) -> None:
        self._app = app
        self._keys = keys
        self._open: Counter[str] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path: str = scope["path"]
        if path in _OPEN:
            scope[_CALLER] = Caller("", self._keys.limits)
            await self._app(scope, receive, send)
            return
        caller = self._keys.caller(_bearer(scope))
        if caller is None:
            fault = ApiError(
                "give a valid API key, as the header Authorization: Bearer KEY", 401, code="invalid_api_key"
            )
            await error_response(path, fault, {"www-authenticate": "Bearer"})(scope, receive, send)
            return
        most = caller.limits.max_concurrent
        if most is not None and self._open[caller.name] >= most:
            fault = ApiError(
                f"you have {most:,} requests open, your limit; wait for one", 429, code="too_many_requests"
            )
            await error_response(path, fault)(scope, receive, send)
            return
        scope[_CALLER] = caller
        self._open[caller.name] += 1
        try:
            await self._within(caller.limits.timeout, scope, receive, send)
        finally:
            self._open[caller.name] -= 1

    async def _within(self, timeout: float | None, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the app, for ``timeout`` seconds at most. What has no answer then gets status 504, a stream a last event."""
        if timeout is None:
            await self._app(scope, receive, send)
            return
        watched = _Watched(send)
        task = asyncio.ensure_future(self._app(scope, receive, watched))
        try:
            await asyncio.wait({task}, timeout=timeout)
            if task.done():
                task.result()
                return
        finally:
            await cancel([task])
        fault = ApiError(f"the request took more than {timeout:g} s, your limit", 504, code="timeout")
        if not watched.begun:
            await error_response(scope["path"], fault)(scope, receive, send)
        elif watched.streams:
            body = {"error": fault.message} if is_kserve(scope["path"]) else fault.body()
            # A client that reads nothing does not take it.
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(
                    send({"type": "http.response.body", "body": event(body).encode()}), _LAST_EVENT_S
                )


class _Watched:
    """Passes a response on. ``begun``: its status is sent; ``streams``: it is a stream of events that has not ended."""

    def __init__(self, send: Send) -> None:
        self.begun = self.streams = False
        self._send = send

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.begun = True
            self.streams = any(value.startswith(b"text/event-stream") for _, value in message["headers"])
        elif not message.get("more_body", False):
            self.streams = False
        await self._send(message)


def _bearer(scope: Scope) -> bytes:
    """Return the key of the header Authorization, b"" without one."""
    given: bytes = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
    kind, _, key = given.partition(b" ")
    return key.strip() if kind.lower() == b"bearer" else b""
