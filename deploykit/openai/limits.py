"""Enforce limits for each caller, and read the keys that identify callers.

A key file has a line for each key, ``NAME:SHA256[:LIMITS]``: the digest of the key in hexadecimal, and limits such as
``max_tokens=512,timeout=30`` in place of those for all.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from deploykit.errors import DataError, UsageError
from deploykit.openai.errors import ApiError

log = logging.getLogger(__name__)

_MOST_BODY_BYTES = 1 << 30
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_SHA256 = re.compile(r"[0-9a-fA-F]{64}")


@dataclass(frozen=True)
class Limits:
    """Limits of one caller; None: no limit.

    ``max_body_bytes``: size of a request's body. ``max_rows``: texts of a request, or answers that it asks for.
    ``max_tokens``: new tokens of an answer. ``timeout``: seconds for a request, streams included. ``max_concurrent``:
    requests that are open at once.
    """

    max_body_bytes: int = 8 << 20
    max_rows: int | None = None
    max_tokens: int | None = None
    timeout: float | None = None
    max_concurrent: int | None = None

    def replaced(self, text: str) -> Limits:
        """Return these limits with those in ``text``, NAME=VALUE separated by commas. Raises UsageError."""
        found: dict[str, float] = {}
        names = [limit.name for limit in dataclasses.fields(self)]
        for part in filter(None, text.split(",")):
            name, _, value = (piece.strip() for piece in part.partition("="))
            if name not in names:
                raise UsageError(f"{name!r} is not a limit", f"limits are {', '.join(names)}")
            try:
                number = float(value) if name == "timeout" else int(value)
            except ValueError:
                number = 0
            if not (0 < number < math.inf) or (name == "max_body_bytes" and number > _MOST_BODY_BYTES):
                raise UsageError(
                    f"the limit {name} is {value!r}",
                    f"give 1 to {_MOST_BODY_BYTES:,}" if name == "max_body_bytes" else "give a number above 0",
                )
            found[name] = number
        return dataclasses.replace(self, **found)  # type: ignore[arg-type]

    def check_rows(self, rows: int, param: str) -> None:
        """Raise ApiError if a request has, or requests, more than ``max_rows``."""
        if self.max_rows is not None and rows > self.max_rows:
            raise ApiError(
                f"{param}: the request asks for {rows:,} answers; your limit is {self.max_rows:,}",
                param=param,
                code="too_many_rows",
            )

    def most_tokens(self, given: int | None, default: int) -> int | None:
        """Return the ``max_tokens`` to ask the model for; ``default`` is its own. Raises ApiError."""
        if self.max_tokens is None:
            return given
        if given is not None and given > self.max_tokens:
            message = f"max_tokens: the value should be at most {self.max_tokens:,}, your limit"
            raise ApiError(message, param="max_tokens", code="too_many_tokens")
        return min(default, self.max_tokens) if given is None else given


@dataclass(frozen=True)
class Caller:
    """The sender of a request: the name of the key, "" without keys."""

    name: str
    limits: Limits


class Keys:
    """The API keys: ``plain`` ones, and those of the file ``path``, read again when it changes.

    Only digests are kept. Without a key or a file, everyone is admitted under ``limits``.
    """

    def __init__(self, plain: Sequence[str] = (), path: Path | None = None, limits: Limits = Limits()) -> None:
        self.limits = limits
        self._plain = {
            digest(key): Caller(f"api-key-{number}", limits) for number, key in enumerate(dict.fromkeys(plain), 1)
        }
        self._path = path
        self._stamp = None if path is None else _stamp(path)
        self._of_file: Mapping[str, Caller] = {} if path is None else read_keys(path, limits)
        if path is not None and not self._of_file:
            raise DataError(f"{path}: has no key", "add a line NAME:SHA256")

    @property
    def needed(self) -> bool:
        """Whether a request needs a key."""
        return bool(self._plain) or self._path is not None

    def caller(self, key: bytes) -> Caller | None:
        """Return the caller with ``key``, or None."""
        if not self.needed:
            return Caller("", self.limits)
        self._reload()
        found = digest(key)
        return self._plain.get(found) or self._of_file.get(found)

    def _reload(self) -> None:
        if self._path is None or (stamp := _stamp(self._path)) == self._stamp:
            return
        self._stamp = stamp
        try:
            self._of_file = read_keys(self._path, self.limits)
            log.warning("%s: read again, %d keys", self._path, len(self._of_file))
        except DataError as error:
            log.error("%s; the keys before it still hold", error.message)


def digest(key: str | bytes) -> str:
    """Return the SHA-256 of a key, in hexadecimal."""
    return hashlib.sha256(key.encode() if isinstance(key, str) else key).hexdigest()


def read_keys(path: Path, limits: Limits) -> dict[str, Caller]:
    """Return the callers of a key file by the digest of their key. Raises DataError naming the line at fault."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {error}", "name a text file of lines NAME:SHA256") from error
    found: dict[str, Caller] = {}
    names = set()
    for number, line in enumerate(lines, 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        name, sha256, own = (*line.split(":", 2), "", "")[:3]
        if not _NAME.fullmatch(name) or not _SHA256.fullmatch(sha256):
            raise DataError(f"{path}: line {number}: is not NAME:SHA256 or NAME:SHA256:LIMITS", "correct the line")
        if name in names or sha256.lower() in found:
            raise DataError(f"{path}: line {number}: the key or the name occurs twice", "remove one")
        try:
            found[sha256.lower()] = Caller(name, limits.replaced(own))
        except UsageError as error:
            raise DataError(f"{path}: line {number}: {error.message}", error.remedy) from None
        names.add(name)
    return found


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino
