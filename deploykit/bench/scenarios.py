"""Define how a model is loaded (scenarios), what is asked (servers) and what came back (answers)."""

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
    """``concurrency`` callers, each asking again as soon as it is answered."""

    concurrency: int

    def __post_init__(self) -> None:
        if self.concurrency < 1:
            raise UsageError(f"a concurrency of {self.concurrency}", "make it 1 or more")

    @property
    def name(self) -> str:
        return f"{self.concurrency} caller{'s' if self.concurrency > 1 else ''}"

    def to_json(self) -> dict[str, Any]:
        return {"kind": "closed_loop", "name": self.name, "concurrency": self.concurrency}


@dataclass(frozen=True)
class Poisson:
    """Independent users: requests arrive at random, ``rate_per_s`` on average, whether or not earlier
    ones are answered.

    A latency counts from the scheduled arrival, so a target that stalls is charged for everyone who
    would have waited meanwhile ("coordinated omission": Tene, How NOT to Measure Latency, 2013).
    """

    rate_per_s: float

    def __post_init__(self) -> None:
        if not 0 < self.rate_per_s < float("inf"):
            raise UsageError(f"a rate of {self.rate_per_s} per second", "make it a number above 0")

    @property
    def name(self) -> str:
        return f"Poisson {self.rate_per_s:g}/s"

    def to_json(self) -> dict[str, Any]:
        return {"kind": "poisson", "name": self.name, "rate_per_s": self.rate_per_s}

    def arrivals(self, seconds: float, seed: int) -> NDArray[np.float64]:
        """Arrival times within [0, ``seconds``), ascending, in seconds; the same for the same seed."""
        random = np.random.default_rng(seed)
        # Of a Poisson process: the count is Poisson, the times are uniform given the count.
        count = max(1, random.poisson(self.rate_per_s * seconds))
        return np.sort(random.uniform(0.0, seconds, count))


@dataclass(frozen=True)
class Within:
    """Arrivals as of ``Poisson``, at the highest rate whose p99 stays within ``limit_ms``: found by a search."""

    limit_ms: float

    def __post_init__(self) -> None:
        if not 0 < self.limit_ms < float("inf"):
            raise UsageError(f"a p99 within {self.limit_ms} ms", "make it a number above 0")

    @property
    def name(self) -> str:
        return f"p99 within {self.limit_ms:g} ms"

    def to_json(self) -> dict[str, Any]:
        return {"kind": "p99_within", "name": self.name, "limit_ms": self.limit_ms}


Scenario = ClosedLoop | Poisson | Within


@dataclass(frozen=True)
class Server:
    """The model ``model`` on the Triton server at ``url`` (HTTP), asked one text a request.

    ``generations``: of a translator, one for each text, where they differ.
    """

    url: str
    model: str
    task: TaskFacts
    generations: Sequence[Generation] = ()


@dataclass(frozen=True)
class Answers:
    """What a load generator saw. ``latencies_ms`` and ``tokens`` (the sum) are of the successful requests;
    ``texts`` holds what was last answered to a row of the texts."""

    duration_s: float
    cpu_s: float
    latencies_ms: NDArray[np.float64]
    texts: Mapping[int, str] = field(default_factory=dict)
    tokens: int = 0
    errors: Mapping[str, int] = field(default_factory=dict)
    send_lag_ms: NDArray[np.float64] | None = None


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
