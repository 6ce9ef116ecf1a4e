"""Answer the routes of Triton's HTTP API under /v2 by passing requests on to Triton.

Only the routes for inference, health and metadata are offered. Routes that load models, map memory or change the logging
are not.

Source: KServe Open Inference Protocol v2, REST; Triton, "Generate Extension" and "Binary Tensor Data Extension".
"""

from __future__ import annotations

import asyncio
import io
import json
import re
import time
from collections.abc import Collection, Mapping
from typing import Any
from urllib.parse import quote

import aiohttp
from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from deploykit.openai.calls import Call, call_of
from deploykit.openai.disconnect import while_connected
from deploykit.openai.errors import PATIENCE_S, PAUSE_S, ApiError
from deploykit.openai.read_body import read_bytes
from deploykit.runtime.served import LOST
from deploykit.runtime.tracing import trace_headers
from deploykit.runtime.triton_messages import RELOADING
from deploykit.tasks.text_generation.triton_config import TEXT_GENERATION

_ABOUT_SERVER = re.compile(r"/v2(/health/(live|ready)|/models/stats)?")
_ABOUT_MODEL = re.compile(r"/v2/models/(?P<model>[^/]+)(?P<version>/versions/[0-9]+)?(?P<what>/ready|/config|/stats)?")
_ASK = re.compile(
    r"/v2/models/(?P<model>[^/]+)(?P<version>/versions/[0-9]+)?(?P<what>/infer|/generate|/generate_stream)"
)
_JSON_LENGTH = "inference-header-content-length"
_SENT = ("accept", "accept-encoding", "content-type", _JSON_LENGTH)
_KINDS = {"STRING": (str, "a text"), "BOOL": (bool, "true or false"), "INT64": (int, "whole numbers")}
_INPUTS = {
    name: _KINDS[kind]
    for name, kind in re.findall(r'input { name: "(\w+)" data_type: TYPE_(\w+)', TEXT_GENERATION.template)
}
_RETURNED = ("content-type", "content-encoding", "content-length", _JSON_LENGTH)


class TritonRoutes:
    """The routes for the ``models`` of the Triton server at ``url``. ``generating`` are the models that generate text.

    Their answers over these routes are not counted, so a caller with a limit of rows or tokens must use OpenAI's routes.
    """

    def __init__(self, url: str, models: Collection[str], generating: Collection[str]) -> None:
        self._url = url
        self._models = frozenset(models)
        self._generating = frozenset(generating)
        self._session: aiohttp.ClientSession | None = None

    def add_to(self, app: FastAPI) -> None:
        app.add_api_route("/v2", self._get, methods=["GET"])
        app.add_api_route("/v2/{path:path}", self._get, methods=["GET"])
        app.add_api_route("/v2/{path:path}", self._post, methods=["POST"])

    async def close(self) -> None:
        """Close all connections to Triton."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def _get(self, request: Request) -> Response:
        path = request.url.path
        call = call_of(request)
        if _ABOUT_SERVER.fullmatch(path):
            call.route = path
            return await self._forward(request, path)
        return await self._forward(request, self._of_model(_ABOUT_MODEL.fullmatch(path), path, call))

    async def _post(self, request: Request) -> Response:
        path = request.url.path
        found = _ASK.fullmatch(path)
        call = call_of(request)
        target = self._of_model(found, path, call)
        limits = call.limits
        assert found is not None
        if found["model"] in self._generating and (limits.max_rows or limits.max_tokens):
            raise ApiError(f"{path}: your key has a limit of answers or tokens; ask /v1/completions", 403)
        body = await read_bytes(request)
        if limits.max_rows is not None and found["what"] == "/infer":
            call.rows = _rows(body, request.headers.get(_JSON_LENGTH))
            limits.check_rows(call.rows, "inputs")
        if found["model"] in self._generating:
            _check_kinds(body)
        return await self._forward(request, target, body, again=found["version"] is None)

    def _of_model(self, found: re.Match[str] | None, path: str, call: Call) -> str:
        """Return the path at Triton. Raises ApiError for a route that is not answered here."""
        if found is None:
            raise ApiError(f"{path}: there is no such route here", 404)
        if found["model"] not in self._models:
            raise ApiError(f"Request for unknown model: '{found['model']}' is not found", 404)
        call.model, call.route = found["model"], f"/v2/models/NAME{found['what'] or ''}"
        return f"/v2/models/{quote(found['model'])}{found['version'] or ''}{found['what'] or ''}"

    async def _forward(
        self, request: Request, path: str, body: bytes | None = None, *, again: bool = False
    ) -> Response:
        """Forward a request. With ``again``, retry a request that was lost because a model process died."""
        if self._session is None:
            # Encoded answers are forwarded unchanged; the caller sets the time limit.
            self._session = aiohttp.ClientSession(
                auto_decompress=False,
                connector=aiohttp.TCPConnector(limit=0),
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=5.0),
                skip_auto_headers=("accept-encoding", "user-agent", "content-type"),
            )
        if body is None:
            await read_bytes(request)
        headers = {name: value for name in _SENT if (value := request.headers.get(name)) is not None}
        headers |= trace_headers()
        deadline = time.monotonic() + (PATIENCE_S if again else 0.0)
        while True:
            data = None if body is None else io.BytesIO(body)  # of plain bytes, aiohttp warns if they are many
            asked = self._session.request(request.method, f"{self._url}{path}", data=data, headers=headers)
            try:
                answer = await while_connected(request.receive, asked)
                if not again or answer.status not in LOST:
                    return _PassedOn(answer)
                refusal = await while_connected(request.receive, answer.read())
            except (aiohttp.ClientError, asyncio.TimeoutError, OSError) as error:
                if time.monotonic() > deadline:
                    raise ApiError(f"Triton does not answer now ({error}); retry in some seconds", 503) from None
            else:
                if time.monotonic() > deadline or not RELOADING.search(refusal.decode(errors="replace")):
                    return Response(refusal, answer.status, _kept(answer))
            await while_connected(request.receive, asyncio.sleep(PAUSE_S))


class _PassedOn(Response):
    """An answer of Triton, forwarded as it arrives."""

    def __init__(self, answer: aiohttp.ClientResponse) -> None:
        kept = _kept(answer)
        super().__init__(status_code=answer.status, headers=kept)
        if "content-length" not in kept:
            del self.headers["content-length"]
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._answer:
            await while_connected(receive, self._send(send))

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for piece in self._answer.content.iter_any():
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def _kept(answer: aiohttp.ClientResponse) -> dict[str, str]:
    return {name: answer.headers[name] for name in _RETURNED if name in answer.headers}


def _rows(body: bytes, json_length: str | None) -> int:
    """Return the rows of the longest input of a request. Raises ApiError if they cannot be counted."""
    if json_length is not None and not (
        json_length.isascii() and json_length.isdigit() and int(json_length) <= len(body)
    ):
        raise ApiError(f"{_JSON_LENGTH}: is not a valid length for this body")
    try:
        text = body if json_length is None else body[: int(json_length)]
        request = json.loads(text, object_pairs_hook=_unique)
        return max(int(tensor["shape"][0]) for tensor in request["inputs"])
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        raise ApiError(f"failed to parse the request JSON buffer: {error or 'nested too deeply'}") from None


def _check_kinds(body: bytes) -> None:
    """Raise ApiError for an input of a language model that has a value of the wrong type: Triton does not name it."""
    try:
        request = json.loads(body)
    except (ValueError, RecursionError):
        return  # Triton says what is wrong
    for name, given in request.items() if isinstance(request, dict) else ():
        if name not in _INPUTS:
            continue
        kind, wanted = _INPUTS[name]
        if any(type(value) is not kind for value in (given if isinstance(given, list) else [given])):
            raise ApiError(f"{name} has a value of another type: give {wanted}")


def _unique(pairs: list[tuple[str, Any]]) -> Mapping[str, Any]:
    """Return a JSON object. Triton takes the first of two values with one name, Python the last, so they are refused."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name occurs twice in an object")
    return found
