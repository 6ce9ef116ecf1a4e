"""Parse sizes and times that options give with a unit."""

from __future__ import annotations

import re
from collections.abc import Mapping

from deploykit.errors import UsageError

_MS: Mapping[str, float] = {"us": 1e-3, "ms": 1.0, "s": 1e3}
_BYTES: Mapping[str, float] = {"mb": 1e6, "gb": 1e9, "mib": 2**20, "gib": 2**30}
_SECONDS: Mapping[str, float] = {"s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}
_NUMBER = r"(\d+(?:\.\d+)?|\.\d+)"


def parse_size(option: str, text: str) -> float:
    """Parse ``1GB``, ``512MiB`` and the like to units of 1e6 bytes. Raises UsageError that names the ``option``."""
    size = _parse(text, _BYTES)
    if size is None:
        raise UsageError(f"{option} {text!r} is not a size", "give one above 0, like 800MB, 1GB or 2GiB")
    return size / 1e6


def parse_time(option: str, text: str) -> float:
    """Parse ``90s``, ``10m``, ``1h`` to seconds. Raises UsageError that names the ``option``."""
    seconds = _parse(text, _SECONDS)
    if seconds is None:
        raise UsageError(f"{option} {text!r} is not a time", "give one above 0, like 90s, 10m or 1h")
    return seconds


def parse_latency(option: str, text: str) -> float:
    """Parse ``50ms``, ``0.2s`` to milliseconds. Raises UsageError that names the ``option``."""
    latency = _parse(text, _MS)
    if latency is None:
        raise UsageError(f"{option}: {text!r} is not a time", "give one above 0, like 50ms or 0.2s")
    return latency


def _parse(text: str, units: Mapping[str, float]) -> float | None:
    """Parse a number above 0 with a unit; None for anything else."""
    match = re.fullmatch(rf"{_NUMBER}\s*([a-z]+)", text.strip().lower())
    if match is None or match[2] not in units:
        return None
    return float(match[1]) * units[match[2]] or None
