"""Find how many texts/s a model can answer within a latency limit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

_STEP = 1.5
_PRECISION = 1.05  # largest relative distance between the rate found and one that failed
_LEAST_RATE = 0.5


class Probe(Protocol):
    """The measurement at one rate."""

    @property
    def errors(self) -> int: ...

    @property
    def latency_ms(self) -> dict[str, float]: ...


AnyProbe = TypeVar("AnyProbe", bound=Probe)


def highest_rate(
    probe: Callable[[float], AnyProbe], limit_ms: float, start: float, figure: str = "p99"
) -> AnyProbe | None:
    """Return the probe at the highest rate whose p99 (or other ``figure``) stays within ``limit_ms`` without a failed
    request.

    The search starts at ``start``, takes steps of 50%, then bisects to 5%. Returns None if one request every two
    seconds is already too many.

    Source: the Server scenario of MLPerf Inference (Reddi et al., 2020).
    """

    def holds(found: AnyProbe) -> bool:
        return not found.errors and found.latency_ms[figure] <= limit_ms

    rate, failed = max(start, _LEAST_RATE), None
    best = probe(rate)
    while not holds(best):
        if rate <= _LEAST_RATE:
            return None
        failed, rate = rate, max(rate / _STEP, _LEAST_RATE)
        best = probe(rate)
    while failed is None:
        found = probe(rate * _STEP)
        if holds(found):
            best, rate = found, rate * _STEP
        else:
            failed = rate * _STEP
    while failed / rate > _PRECISION:
        middle = (failed * rate) ** 0.5
        found = probe(middle)
        if holds(found):
            best, rate = found, middle
        else:
            failed = middle
    return best
