"""The same translation model on two Triton servers: one lets requests join the running batch, one does not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from deploykit.bench.load import ClosedLoop, Poisson, Scenario, Server, measure
from deploykit.bench.run import Candidate, run_bench
from deploykit.predictor import open_predictor
from deploykit.runtime.generation import override
from deploykit.tasks import Translation
from deploykit.triton.repository import ServingSettings, package
from deploykit.triton.server import TritonServer

NAMES = {True: "in-flight batching", False: "batch at a time"}
_CALLERS = 32
_SHARES = (0.25, 0.5, 0.75, 0.9)  # of what the first answers in a closed loop


def measure_serving(
    export: Path,
    folder: Path,
    texts: Sequence[str],
    references: Sequence[str] | None,
    *,
    rates: Sequence[float] | None,
    rounds: int,
    seconds: float,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """A bench result of the two, greedy: Poisson arrivals at ``rates`` a second, and a closed loop.

    Rates not given are shares of what in-flight batching answers when 32 callers ask without a pause.
    """
    warmup_s = min(1.0, seconds)
    servers = []
    for in_flight, name in NAMES.items():
        repository = folder / name.replace(" ", "-")
        package(export, "model", repository, settings=ServingSettings(in_flight=in_flight), stream=False)
        servers.append(TritonServer(repository, http_port=0, grpc_port=0, metrics_port=0))
    with servers[0], servers[1]:
        candidates = [_candidate(name, server.urls.http) for name, server in zip(NAMES.values(), servers)]
        callers = ClosedLoop(_CALLERS)
        if rates is None:
            first = candidates[0]
            asked = measure(
                first.target, texts, callers, seconds=seconds, generation=first.generation, warmup_s=warmup_s
            )
            most = asked.throughput_per_s
            rates = [round(share * most, 1) for share in _SHARES]
            say(f"{most:.0f} texts/s with {_CALLERS} callers: arrivals at {', '.join(map(str, rates))} a second")
        scenarios: list[Scenario] = [*map(Poisson, rates), callers]
        return run_bench(
            candidates, texts, references, scenarios, rounds=rounds, seconds=seconds, warmup_s=warmup_s, progress=say
        ).to_json()


def _candidate(name: str, url: str) -> Candidate:
    served = open_predictor("model", url=url)
    served.close()
    assert isinstance(served.task, Translation)
    return Candidate(name, Server(url, "model", served.task), generation=override(served.task, {"beam_size": 1}))
