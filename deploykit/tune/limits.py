"""Parse the latency limit of tuning."""

from __future__ import annotations

from dataclasses import dataclass

from deploykit.bench.scenarios import TIMEOUT_S
from deploykit.errors import UsageError
from deploykit.units import parse_latency

_FIGURES = ("p50", "p90", "p99")


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
    limit_ms = parse_latency(f"--slo {text!r}", limit)
    if limit_ms > 1e3 * TIMEOUT_S:
        raise UsageError(f"--slo {text!r}: requests time out after {TIMEOUT_S:g} s", "give a lower limit")
    return Slo(figure, limit_ms)
