"""Record facts of a request while it is answered, and write the access log.

Neither the log nor the metrics have any text of a request: no prompt, no answer, no path that is not a route. Only a log that
is opened with ``texts`` has the bodies.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING

from deploykit.errors import UsageError
from deploykit.openai.generator import Piece
from deploykit.openai.limits import Caller, Limits

if TYPE_CHECKING:
    from starlette.requests import Request

logger = logging.getLogger(__name__)

SCOPE = "deploykit.call"


@dataclass
class Call:
    """One request. ``route`` and ``model`` are "" until they are known; ``error`` is a code, or a status."""

    caller: Caller
    client: str
    method: str
    route: str = ""
    model: str = ""
    status: int = 500
    error: str = ""
    rows: int = 0
    stream: bool = False
    prompt_tokens: int = 0
    completion_tokens: int = 0
    began: float = field(default_factory=time.monotonic)
    first_token_seconds: float | None = None
    request_body: str | None = None
    response_body: str | None = None

    @property
    def limits(self) -> Limits:
        return self.caller.limits

    @property
    def seconds(self) -> float:
        """Time since the request arrived."""
        return time.monotonic() - self.began

    async def counted(self, pieces: AsyncGenerator[Piece, None]) -> AsyncGenerator[Piece, None]:
        """Yield ``pieces``, and count their tokens."""
        prompt = 0
        async with aclosing(pieces):
            async for piece in pieces:
                if self.first_token_seconds is None and any(piece.tokens):
                    self.first_token_seconds = self.seconds
                self.prompt_tokens += max(piece.prompt_tokens - prompt, 0)
                prompt = max(piece.prompt_tokens, prompt)
                self.completion_tokens += sum(piece.tokens)
                yield piece


def call_of(request: Request) -> Call:
    """Return the call that ``request`` is."""
    call: Call = request.scope[SCOPE]
    return call


class AccessLog:
    """Writes a JSON object for each request to the file ``path``; "-" is stderr. Raises UsageError.

    With ``texts``, an object also has the bodies of request and response.
    """

    def __init__(self, path: Path, *, texts: bool = False) -> None:
        self.texts = texts
        try:
            self._file = sys.stderr if str(path) == "-" else open(path, "a", buffering=1, encoding="utf-8")  # noqa: SIM115
        except OSError as error:
            raise UsageError(f"{path}: cannot be written: {error.strerror}", "choose another --access-log") from error

    def close(self) -> None:
        if self._file is not sys.stderr:
            with suppress(OSError):  # text that a full disk did not accept
                self._file.close()

    def write(self, call: Call) -> None:
        record = {
            "time": datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
            "client": call.client,
            "key": call.caller.name,
            "method": call.method,
            "route": call.route,
            "model": call.model,
            "status": call.status,
            "error": call.error,
            "seconds": round(call.seconds, 6),
            "stream": call.stream,
            "rows": call.rows,
            "prompt_tokens": call.prompt_tokens,
            "completion_tokens": call.completion_tokens,
            "first_token_seconds": None if call.first_token_seconds is None else round(call.first_token_seconds, 6),
        }
        if self.texts:
            record |= {"request": call.request_body, "response": call.response_body}
        try:
            self._file.write(json.dumps(record) + "\n")
        except OSError as error:  # a full disk must not end the request
            logger.error("the access log cannot be written: %s", error.strerror)
