"""Errors in the form of OpenAI's API: ``{"error": {"message", "type", "param", "code"}}``.

Source: OpenAI API reference, "Error codes".
"""

from __future__ import annotations

from typing import Any

from deploykit.errors import RequestError

_TYPES = {401: "authentication_error", 429: "rate_limit_error"}


class ApiError(RequestError):
    """Raised for a request that is answered with an error: ``status`` is the HTTP status, ``param`` the field at fault.

    ``restarting``: Triton is being restarted, so the same request may succeed soon.
    """

    def __init__(
        self,
        message: str,
        status: int = 400,
        *,
        param: str | None = None,
        code: str | None = None,
        restarting: bool = False,
    ) -> None:
        super().__init__(message, status)
        self.param = param
        self.code = code
        self.restarting = restarting

    def body(self) -> dict[str, Any]:
        """Return the body of the response."""
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


PATIENCE_S = 5.0
"""Seconds for which a lost request without an answer is retried, while Triton is restarted."""
PAUSE_S = 0.1
"""Pause before a retry."""


def overloaded(message: str) -> ApiError:
    """Return the error for a full queue."""
    return ApiError(f"{message}; send fewer requests at once", 429, code="queue_full")


def restarting(message: str) -> ApiError:
    """Return the error for a model that Triton is loading again."""
    return ApiError(f"{message}; retry in some seconds", 503, code="model_restarting", restarting=True)
