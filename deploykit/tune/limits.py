"""Parse the limits of tuning: latency, memory, time."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from deploykit.bench.scenarios import TIMEOUT_S
from deploykit.errors import UsageError

_FIGURES = ("p50", "p90", "p99")
_MS: Mapping[str, float] = {"us": 1e-3, "ms": 1.0, "s": 1e3}
_BYTES: Mapping[str, float] = {"mb": 1e6, "gb": 1e9, "mib": 2**20, "gib": 2**30}
_SECONDS: Mapping[str, float] = {"s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}
_NUMBER = r"(\d+(?:\.\d+)?|\.\d+)"


@dataclass(frozen=True)
class Slo:
    """Service level objective: the latency percentile ``figure`` stays within ``limit_ms``."""

    figure: str
    limit_ms: float

    def __str__(self) -> str:
        return f"{self.figure} within {self.limit_ms:g} ms"


def parse_slo(text: str) -> Slo:
    """Parse ``p99=50ms``, ``p50=0.2s``. Raises UsageError."""
    figure, equals, limit = text.strip().lower().partition("=")
    if not equals:
        raise UsageError(f"--slo {text!r} has no limit", "write it like --slo p99=50ms")
    if figure not in _FIGURES:
        raise UsageError(f"--slo {text!r}: unknown percentile {figure!r}", f"give one of: {', '.join(_FIGURES)}")
    limit_ms = _parse(limit, _MS)
    if limit_ms is None:
        raise UsageError(f"--slo {text!r}: {limit!r} is not a time", "give one above 0, like 50ms or 0.2s")
    if limit_ms > 1e3 * TIMEOUT_S:
        raise UsageError(f"--slo {text!r}: requests time out after {TIMEOUT_S:g} s", "give a lower limit")
    return Slo(figure, limit_ms)


def parse_memory(text: str) -> float:
    """Parse ``1GB``, ``512MiB`` and the like to units of 1e6 bytes. Raises UsageError."""
    size = _parse(text, _BYTES)
    if size is None:
        raise UsageError(f"--max-memory {text!r} is not a size", "give one above 0, like 800MB, 1GB or 2GiB")
    return size / 1e6


def parse_time(text: str) -> float:
    """Parse ``90s``, ``10m``, ``1h`` to seconds. Raises UsageError."""
    seconds = _parse(text, _SECONDS)
    if seconds is None:
        raise UsageError(f"--time {text!r} is not a time", "give one above 0, like 90s, 10m or 1h")
    return seconds


def _parse(text: str, units: Mapping[str, float]) -> float | None:
    """Parse a number above 0 with a unit; None for anything else."""
    match = re.fullmatch(rf"{_NUMBER}\s*([a-z]+)", text.strip().lower())
    if match is None or match[2] not in units:
        return None
    return float(match[1]) * units[match[2]] or None
