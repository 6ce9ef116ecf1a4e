"""Errors of deploykit.

    DeploykitError                exit code 1
    ├── UsageError                an option or a combination of options is wrong; exit code 2
    ├── DataError                 a data file, row or field
    ├── ArtifactError             a directory that a stage wrote or should read
    │   └── CorruptArtifactError  a file differs from its recorded SHA-256
    ├── MissingDependencyError    a Python or system package is not installed
    ├── EngineError               an inference engine cannot load or run a graph
    ├── ExportError               parity, quantization or accuracy did not hold
    └── ServerError               Triton did not start, or was lost
        ├── RequestError          the server answered a request with an error
        ├── RefusedError          a served model refuses a request; raised only inside Triton
        (runtime/triton_requests.py) └── QueueFullError        the queue of waiting requests is full

A message says what is wrong and where; the remedy says what to do about it. Private subclasses exist where one module
raises and catches them.
"""

from __future__ import annotations


class DeploykitError(Exception):
    """Base of all expected errors. Commands show message and remedy, without a traceback."""

    exit_code = 1

    def __init__(self, message: str, remedy: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.message}\n  remedy: {self.remedy}" if self.remedy else self.message


class Interrupted(KeyboardInterrupt):
    """Raised instead of KeyboardInterrupt by work that can be continued; the message says from which point."""

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal


class UsageError(DeploykitError):
    exit_code = 2


class DataError(DeploykitError):
    pass


class ArtifactError(DeploykitError):
    pass


class CorruptArtifactError(ArtifactError):
    pass


class MissingDependencyError(DeploykitError):
    pass


class EngineError(DeploykitError):
    pass


class ExportError(DeploykitError):
    pass


class ServerError(DeploykitError):
    pass


class RequestError(ServerError):
    """Raised when the server answered a request with an error.

    ``status`` is the HTTP status (400 bad request, 404 no such model, 503 queue full, 500 failure inside the model).
    """

    def __init__(self, message: str, status: int, remedy: str | None = None) -> None:
        super().__init__(message, remedy)
        self.status = status


class QueueFullError(ServerError):
    """Raised when the queue of waiting requests is full."""

    def __init__(
        self, message: str = "the queue is full", remedy: str | None = "send fewer requests at once, or try later"
    ) -> None:
        super().__init__(message, remedy)


def first_line(error: BaseException) -> str:
    """Return the first line of a library's message; the error's type if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
