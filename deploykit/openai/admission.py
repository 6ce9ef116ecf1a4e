"""Admit requests: check the key, and enforce the caller's limits of time and open requests. Count and log them.

The other limits are checked where the body is read.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deploykit.openai.calls import SCOPE, AccessLog, Call
from deploykit.openai.collect_answers import cancel, event
from deploykit.openai.errors import ApiError
from deploykit.openai.limits import Caller, Keys
from deploykit.openai.metrics import PortMetrics

HEALTH = "/health"
_OPEN = (HEALTH, "/v2/health/live", "/v2/health/ready")
_NO_KEY = ApiError("give a valid API key, as the header Authorization: Bearer KEY", 401, code="invalid_api_key")
_TWO_LENGTHS = ApiError("Content-Length: it does not go with Transfer-Encoding; send one of them")
_LAST_EVENT_S = 1.0
_MOST_BODY_BYTES = 1 << 20


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


class Admission:
    """Pass requests on to ``app`` that ``keys`` admit, count them in ``metrics`` and write them to ``log``.

    The routes of health need no key.
    """

    def __init__(self, app: ASGIApp, keys: Keys, metrics: PortMetrics, log: AccessLog | None) -> None:
        self._app = app
        self._keys = keys
        self._metrics = metrics
        self._log = log
        self._open: Counter[str] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        opened = scope["path"] in _OPEN
        anyone = Caller("", self._keys.limits)
        caller = anyone if opened else self._keys.caller(_bearer(scope))
        client = scope["client"][0] if scope["client"] else ""
        call = scope[SCOPE] = Call(caller or anyone, client, scope["method"])
        bodies = None
        if self._log is not None and self._log.texts and scope["method"] == "POST":
            bodies = _Bodies(receive, send)
            receive, send = bodies.receive, bodies.send
        watched = _Watched(send, call)
        self._metrics.in_flight.inc()
        try:
            if {b"content-length", b"transfer-encoding"} <= {name for name, _ in scope["headers"]}:
                # A proxy may have read the body differently.
                await self._refuse(_TWO_LENGTHS, scope, receive, watched)
            elif opened:
                await self._app(scope, receive, watched)
            elif caller is None:
                await self._refuse(_NO_KEY, scope, receive, watched)
            else:
                await self._admit(caller, scope, receive, watched)
        finally:
            self._metrics.in_flight.dec()
            if bodies is not None:
                call.request_body, call.response_body = bodies.request, bodies.response
            self._record(call, scope)

    async def _admit(self, caller: Caller, scope: Scope, receive: Receive, send: _Watched) -> None:
        """Answer a request, unless its caller has too many open requests."""
        most = caller.limits.max_concurrent
        if most is not None and self._open[caller.name] >= most:
            message = f"you have {most:,} requests open, your limit; wait for one"
            await self._refuse(ApiError(message, 429, code="too_many_requests"), scope, receive, send)
            return
        self._open[caller.name] += 1
        try:
            await self._within(caller.limits.timeout, scope, receive, send)
        finally:
            self._open[caller.name] -= 1

    async def _within(self, timeout: float | None, scope: Scope, receive: Receive, send: _Watched) -> None:
        """Run the app for at most ``timeout`` seconds. Then a request without an answer gets status 504, and a stream a last event."""
        if timeout is None:
            await self._app(scope, receive, send)
            return
        task = asyncio.ensure_future(self._app(scope, receive, send))
        try:
            await asyncio.wait({task}, timeout=timeout)
            if task.done():
                task.result()
                return
        finally:
            await cancel([task])
        fault = ApiError(f"the request took more than {timeout:g} s, your limit", 504, code="timeout")
        if not send.begun:
            await self._refuse(fault, scope, receive, send)
        elif send.streams:
            scope[SCOPE].error = "timeout"
            body = {"error": fault.message} if is_kserve(scope["path"]) else fault.body()
            # It cannot be sent to a client that reads nothing.
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(
                    send({"type": "http.response.body", "body": event(body).encode()}), _LAST_EVENT_S
                )

    async def _refuse(self, fault: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
        scope[SCOPE].error = fault.code or ""
        headers = {_NO_KEY: {"www-authenticate": "Bearer"}, _TWO_LENGTHS: {"connection": "close"}}.get(fault)
        await error_response(scope["path"], fault, headers)(scope, receive, send)

    def _record(self, call: Call, scope: Scope) -> None:
        """Count a finished request."""
        call.route = call.route or getattr(scope.get("route"), "path", "")
        if call.status >= 400:
            call.error = call.error or str(call.status)
        metrics, of_request = self._metrics, (call.route, call.model)
        metrics.requests.labels(*of_request, call.status).inc()
        metrics.seconds.labels(*of_request).observe(call.seconds)
        if call.error:
            metrics.errors.labels(*of_request, call.error).inc()
        if call.prompt_tokens:
            metrics.prompt_tokens.labels(call.model).inc(call.prompt_tokens)
            metrics.completion_tokens.labels(call.model).inc(call.completion_tokens)
        if call.stream and call.first_token_seconds is not None:
            metrics.first_token.labels(call.model).observe(call.first_token_seconds)
        if self._log is not None:
            self._log.write(call)


class _Watched:
    """Passes a response on, and notes its status in ``call``.

    ``begun``: its status is sent; ``streams``: it is a stream of events that has not ended.
    """

    def __init__(self, send: Send, call: Call) -> None:
        self.begun = self.streams = False
        self._send = send
        self._call = call

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.begun = True
            self._call.status = message["status"]
            self.streams = any(value.startswith(b"text/event-stream") for _, value in message["headers"])
            self._call.stream = self.streams
        elif not message.get("more_body", False):
            self.streams = False
        await self._send(message)


class _Bodies:
    """Keeps the bodies of a request and of its response, up to 1 MiB of each, while they pass."""

    def __init__(self, receive: Receive, send: Send) -> None:
        self._receive = receive
        self._send = send
        self._bodies = {"http.request": bytearray(), "http.response.body": bytearray()}

    @property
    def request(self) -> str:
        return self._bodies["http.request"].decode(errors="replace")

    @property
    def response(self) -> str:
        return self._bodies["http.response.body"].decode(errors="replace")

    async def receive(self) -> Message:
        message = await self._receive()
        self._keep(message)
        return message

    async def send(self, message: Message) -> None:
        self._keep(message)
        await self._send(message)

    def _keep(self, message: Message) -> None:
        body = self._bodies.get(message["type"])
        if body is not None:
            body += message.get("body", b"")[: _MOST_BODY_BYTES - len(body)]


def _bearer(scope: Scope) -> bytes:
    """Return the key of the header Authorization, b"" without one."""
    given: bytes = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
    kind, _, key = given.partition(b" ")
    return key.strip() if kind.lower() == b"bearer" else b""
