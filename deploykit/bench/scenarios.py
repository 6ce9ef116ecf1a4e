"""Loads (scenarios), the server under test, and the record of its answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deploykit.errors import UsageError
from deploykit.runtime.generation import Generation
from deploykit.tasks.protocol import TaskFacts

TIMEOUT_S = 10.0


@dataclass(frozen=True)
class ClosedLoop:
    """Closed loop: ``concurrency`` callers, each of which sends its next request as soon as it has its answer."""

    concurrency: int

    def __post_init__(self) -> None:
        if self.concurrency < 1:
            raise UsageError(f"--max-concurrency is {self.concurrency}", "give 1 or more")

    @property
    def name(self) -> str:
        return f"{self.concurrency} caller{'s' if self.concurrency > 1 else ''}"

    def to_json(self) -> dict[str, Any]:
        return {"kind": "closed_loop", "name": self.name, "concurrency": self.concurrency}


@dataclass(frozen=True)
class Poisson:
    """Open loop: requests arrive at random, on average ``rate_per_s``, whether or not earlier ones are answered.

    A latency counts from the scheduled arrival, so a stall counts against all requests that would have waited
    ("coordinated omission": Tene, How NOT to Measure Latency, 2013).
    """

    rate_per_s: float

    def __post_init__(self) -> None:
        if not 0 < self.rate_per_s < float("inf"):
            raise UsageError(f"--request-rate is {self.rate_per_s}", "give a number above 0")

    @property
    def name(self) -> str:
        return f"Poisson {self.rate_per_s:g}/s"

    def to_json(self) -> dict[str, Any]:
        return {"kind": "poisson", "name": self.name, "rate_per_s": self.rate_per_s}

    def arrivals(self, seconds: float, seed: int) -> NDArray[np.float64]:
        """Return arrival times within [0, ``seconds``), ascending; the same for the same seed."""
        random = np.random.default_rng(seed)
        # In a Poisson process the count is Poisson-distributed; given the count, the times are uniform.
        count = max(1, random.poisson(self.rate_per_s * seconds))
        return np.sort(random.uniform(0.0, seconds, count))


@dataclass(frozen=True)
class Within:
    """Arrivals like ``Poisson``, at the highest rate whose p99 stays within ``limit_ms``, which a search finds."""

    limit_ms: float

    def __post_init__(self) -> None:
        if not 0 < self.limit_ms < float("inf"):
            raise UsageError(f"--p99-limit is {self.limit_ms}", "give a number above 0")

    @property
    def name(self) -> str:
        return f"p99 within {self.limit_ms:g} ms"

    def to_json(self) -> dict[str, Any]:
        return {"kind": "p99_within", "name": self.name, "limit_ms": self.limit_ms}


Scenario = ClosedLoop | Poisson | Within


@dataclass(frozen=True)
class Server:
    """The model ``model`` on the Triton server at ``url`` (HTTP), asked one text per request.

    ``generations``: search parameters for each text, where they differ.
    """

    url: str
    model: str
    task: TaskFacts
    generations: Sequence[Generation] = ()


@dataclass(frozen=True)
class LoadResult:
    """Record of a load generator. ``latencies_ms`` and ``tokens`` (the sum) are of successful requests; ``texts`` has
    the last answer to each row.
    """

    duration_s: float
    cpu_s: float
    latencies_ms: NDArray[np.float64]
    texts: Mapping[int, str] = field(default_factory=dict)
    tokens: int = 0
    errors: Mapping[str, int] = field(default_factory=dict)
    send_lag_ms: NDArray[np.float64] | None = None
