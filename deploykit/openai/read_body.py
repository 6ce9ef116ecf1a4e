"""Read the JSON body of a request into a pydantic model. Every fault is an ApiError that names the field."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any, NoReturn, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from starlette.requests import Request

from deploykit.openai.calls import call_of
from deploykit.openai.errors import ApiError

BODY_S = 60.0
"""Time that a body may take to arrive."""
_LARGE_BYTES = 256 << 10
_SURROGATE = re.compile(r"[\ud800-\udfff]")
MAX_DEPTH = 64
"""Deepest nesting of lists and objects in a body."""


class Body(BaseModel):
    """A JSON object of a request. A null field counts as missing; an undeclared field is refused."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, data: Any) -> Any:
        return {name: value for name, value in data.items() if value is not None} if isinstance(data, dict) else data


Read = TypeVar("Read", bound=Body)


async def read_body(request: Request, kind: type[Read]) -> Read:
    """Return the body of ``request``. Raises ApiError: status 400, or as ``read_bytes`` does."""
    raw = await read_bytes(request)
    # A large body would hold up all other requests.
    return parse_body(raw, kind) if len(raw) < _LARGE_BYTES else await asyncio.to_thread(parse_body, raw, kind)


async def read_bytes(request: Request) -> bytes:
    """Return the body unchanged. Raises ApiError: status 413 if it exceeds the caller's limit, 408 if it arrives too slowly, 415 if
    it is compressed."""
    most = call_of(request).limits.max_body_bytes
    too_large = ApiError(f"the body has more than {most:,} bytes", 413, code="body_too_large")

    async def read() -> bytes:
        parts: list[bytes] = []
        size = 0
        async for part in request.stream():
            size += len(part)
            if size > most:
                raise too_large
            parts.append(part)
        return b"".join(parts)

    if request.headers.get("content-encoding", "identity") != "identity":
        raise ApiError("Content-Encoding: send the body without compression", 415)
    if int(request.headers.get("content-length", 0)) > most:
        raise too_large
    try:
        return await asyncio.wait_for(read(), BODY_S)
    except asyncio.TimeoutError:
        raise ApiError(f"the body did not arrive within {BODY_S:g} s", 408, code="timeout") from None


def parse_body(raw: bytes, kind: type[Read]) -> Read:
    """Return ``raw`` as a ``kind``. Raises ApiError."""
    try:
        text = raw.decode()
    except UnicodeDecodeError as fault:
        raise ApiError(f"the body is not UTF-8: byte {raw[fault.start]:#04x} at position {fault.start}") from None
    try:
        data = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ApiError(f"the body is not JSON: {error or 'nested too deeply'}") from None
    if not isinstance(data, dict):
        raise ApiError("the body must be a JSON object")
    _check(data, escapes="\\u" in text)
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise _refusal(error) from None


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _check(data: Any, *, escapes: bool) -> None:
    """Raise ApiError for values nested too deeply and, if there are ``escapes``, strings with half a surrogate pair."""
    waiting: list[tuple[tuple[str | int, ...], Any]] = [((), data)]
    while waiting:
        place, value = waiting.pop()
        if len(place) > MAX_DEPTH:
            param = field_name(place[:1])
            raise ApiError(f"{param}: nested more than {MAX_DEPTH} levels deep", param=param)
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for name, item in items:
            if isinstance(item, dict | list):
                waiting.append(((*place, name), item))
            if escapes and (_broken(item) or _broken(name)):
                param = field_name((*place, name))
                raise ApiError(f"{param}: the text has half a surrogate pair, so it is not Unicode", param=param)


def _broken(value: Any) -> bool:
    return isinstance(value, str) and not value.isascii() and _SURROGATE.search(value) is not None


def field_name(place: tuple[str | int, ...]) -> str:
    """Return the place of a field as in OpenAI's errors: messages[0].content."""
    name = ""
    for part in place:
        name += f"[{part}]" if isinstance(part, int) else f".{_printable(part)}" if name else _printable(part)
    return name


def _printable(name: str) -> str:
    return name.encode(errors="replace").decode()[:100] or '""'


def _refusal(error: ValidationError) -> ApiError:
    """Return the first fault as an ApiError."""
    fault = error.errors(include_url=False, include_input=False)[0]
    param = field_name(fault["loc"]) if fault["loc"] else None
    if fault["type"] == "extra_forbidden":
        return ApiError(f"{param}: this field is not supported", param=param, code="unsupported_parameter")
    if fault["type"] == "missing":
        return ApiError(f"{param}: this field is missing", param=param, code="missing_required_parameter")
    if param is None:  # a rule on several fields: it names them, the one at fault first
        message = fault["msg"].removeprefix("Value error, ")
        return ApiError(message, param=message.partition(":")[0], code="invalid_value")
    message = fault["msg"].removeprefix("Value error, ").replace("Input should", "the value should")
    return ApiError(f"{param}: {message}", param=param, code="invalid_value")
