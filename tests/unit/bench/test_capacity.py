"""The search for the highest rate within a latency limit."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from deploykit.bench.capacity import highest_rate


@dataclass(frozen=True)
class Probe:
    rate: float
    p99: float
    errors: int = 0

    @property
    def latency_ms(self) -> dict[str, float]:
        return {"p99": self.p99}


def queueing(capacity: float) -> tuple[list[float], object]:
    """Return a simulated server with a service time of 5 ms, slower as the rate nears ``capacity`` (M/M/1)."""
    tried: list[float] = []

    def probe(rate: float) -> Probe:
        tried.append(rate)
        return Probe(rate, 5.0 / (1 - rate / capacity) if rate < capacity else 1e6)

    return tried, probe


@pytest.mark.parametrize("start", [1.0, 40.0, 89.0, 90.1, 500.0])
def test_the_rate_is_found_to_five_percent_from_any_start(start: float) -> None:
    tried, probe = queueing(100.0)
    found = highest_rate(probe, 50.0, start)  # type: ignore[arg-type, type-var]
    assert found is not None
    assert 90.0 / 1.05 <= found.rate <= 90.0, "at 90 a second it takes 50 ms"
    assert len(tried) < 20


def test_a_rate_at_which_requests_fail_does_not_hold() -> None:
    found = highest_rate(lambda rate: Probe(rate, 1.0, errors=rate > 30), 50.0, 10.0)
    assert found is not None
    assert 30 / 1.05 <= found.rate <= 30


def test_a_server_too_slow_for_the_limit_has_no_rate() -> None:
    tried: list[float] = []

    def probe(rate: float) -> Probe:
        tried.append(rate)
        return Probe(rate, 80.0)

    assert highest_rate(probe, 50.0, 6.0) is None
    assert tried[-1] == 0.5
