"""Load generation in this process, with predictors of known behaviour."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from deploykit.bench.load import latency_summary, measure
from deploykit.bench.scenarios import ClosedLoop, Poisson, Within
from deploykit.errors import UsageError
from deploykit.tasks.classification.facts import Classification

TEXTS = [f"text {i}" for i in range(40)]


class SlowPredictor:
    """Answers label "b" after ``service_s``; call number ``stall_at`` takes ``stall_s``; ``fail`` raises."""

    task = Classification(("a", "b"), max_length=8, pad_token_id=0)

    def __init__(
        self, service_s: float = 0.002, *, stall_at: int = -1, stall_s: float = 0.0, fail: bool = False
    ) -> None:
        self.batch_sizes: list[int] = []
        self._service_s, self._stall_at, self._stall_s, self._fail = service_s, stall_at, stall_s, fail

    def scores(self, texts: Sequence[str]) -> NDArray[np.float32]:
        self.batch_sizes.append(len(texts))
        time.sleep(self._stall_s if len(self.batch_sizes) == self._stall_at else self._service_s)
        if self._fail:
            raise RuntimeError("out of order\nand more")
        return np.tile(np.array([0.25, 0.75], np.float32), (len(texts), 1))

    def close(self) -> None:
        pass


def test_a_closed_loop_asks_for_all_its_callers_at_once() -> None:
    predictor = SlowPredictor()
    m = measure(predictor, TEXTS, ClosedLoop(4), seconds=0.2, warmup_s=0)
    assert set(predictor.batch_sizes) == {4}
    assert m.requests == 4 * len(predictor.batch_sizes) == len(m.latencies_ms)
    assert m.errors == 0
    assert m.latency_ms["p50"] >= 2.0
    assert m.throughput_per_s == pytest.approx(m.requests / m.duration_s)
    assert m.throughput_per_s <= 4 / 0.002
    assert m.answers[0] == "b"
    assert m.tokens == 0
    assert m.seconds is None


def test_warm_up_is_not_counted() -> None:
    predictor = SlowPredictor()
    m = measure(predictor, TEXTS, ClosedLoop(1), seconds=0.1, warmup_s=0.1)
    assert 0 < m.requests < len(predictor.batch_sizes)


def test_failures_are_counted_with_their_message() -> None:
    m = measure(SlowPredictor(fail=True), TEXTS, ClosedLoop(2), seconds=0.1, warmup_s=0)
    assert m.requests == m.errors == sum(m.error_examples.values()) > 0
    assert set(m.error_examples) == {"out of order"}
    assert m.throughput_per_s == 0
    assert m.latency_ms == {}
    assert m.few_samples


def test_arrivals_have_the_asked_mean_and_follow_the_seed() -> None:
    times = Poisson(200.0).arrivals(50.0, seed=7)
    assert len(times) == pytest.approx(10_000, rel=0.05)
    gaps = np.diff(times)
    assert (gaps >= 0).all()
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.1)  # as of an exponential distribution
    assert (times == Poisson(200.0).arrivals(50.0, seed=7)).all()
    assert len(times) != len(Poisson(200.0).arrivals(50.0, seed=8))


def test_a_stall_counts_for_every_request_that_arrived_meanwhile() -> None:
    predictor = SlowPredictor(0.0005, stall_at=5, stall_s=0.4)
    m = measure(predictor, TEXTS, Poisson(200.0), seconds=0.8, warmup_s=0, seed=3)
    # About 80 requests arrive in 0.4 s, and three quarters of them wait longer than 0.1 s. A generator that also
    # stalled would see one slow request.
    assert (m.latencies_ms > 100).sum() > 20
    assert m.latencies_ms.max() >= 350
    assert max(predictor.batch_sizes) > 10


def test_an_open_loop_takes_64_at_most_and_gives_up_in_the_end() -> None:
    predictor = SlowPredictor(0.05)
    m = measure(predictor, TEXTS, Poisson(5000.0), seconds=0.2, warmup_s=0, timeout_s=0.1)
    assert max(predictor.batch_sizes) == 64
    assert m.errors > 0
    assert m.requests == len(m.latencies_ms) + m.errors == len(Poisson(5000.0).arrivals(0.2, 0))
    assert "not answered in time" in next(iter(m.error_examples))


def test_percentiles_are_ordered_and_of_known_values() -> None:
    summary = latency_summary(np.arange(1.0, 102.0))
    assert summary == {"p50": 51.0, "p90": 91.0, "p99": 100.0, "mean": 51.0, "max": 101.0}


@pytest.mark.parametrize("scenario", [lambda: ClosedLoop(0), lambda: Poisson(0.0), lambda: Poisson(float("nan"))])
def test_senseless_loads_are_refused(scenario: object) -> None:
    with pytest.raises(UsageError):
        scenario()  # type: ignore[operator]


def test_the_rate_within_a_limit_is_measured_at_that_rate() -> None:
    m = measure(SlowPredictor(0.004), TEXTS, Within(60.0), seconds=0.2, warmup_s=0)
    assert m.scenario == Within(60.0)
    assert m.errors == 0
    assert m.latency_ms["p99"] <= 60.0
    assert m.throughput_per_s > 0.5 / 0.004, "it starts from half the rate of one caller, which is within the limit"


def test_without_a_rate_within_the_limit_nothing_is_counted() -> None:
    m = measure(SlowPredictor(0.03), TEXTS, Within(1.0), seconds=0.05, warmup_s=0)
    assert (m.requests, m.errors, m.throughput_per_s, m.latency_ms) == (0, 0, 0.0, {})
