"""Serve a configuration on a separate Triton and measure it under load. The user's repository is not touched."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from deploykit.artifacts import Manifest
from deploykit.bench.capacity import highest_rate
from deploykit.bench.load import FEW_SAMPLES, Measurement, measure
from deploykit.bench.scenarios import ClosedLoop, Poisson, Server
from deploykit.errors import ServerError
from deploykit.triton.config_edit import with_settings
from deploykit.triton.repository import CONFIG, package
from deploykit.triton.server import TritonServer
from deploykit.tune.limits import Slo
from deploykit.tune.search import Configuration, Round

_READY_S = 120.0
_DRAIN_S = 5.0
_WARMUP = 0.25  # as a share of the measured time
_MOST_STRETCHED = 5.0
_MANY = 32
_NEAR = 2.0
_OTHER_ARRIVALS = 1000


@dataclass(frozen=True)
class Subject:
    """The model to tune: the newest ``version`` of ``name``, its ``manifest`` and config.pbtxt.

    ``export`` is the export that it was packaged from, None if not given.
    """

    name: str
    version: Path
    manifest: Manifest
    config: str
    export: Path | None

    @property
    def config_path(self) -> Path:
        return self.version.parent / CONFIG


def measure_served(
    subject: Subject,
    choice: Configuration,
    folder: Path,
    texts: Sequence[str],
    slo: Slo,
    *,
    expected: float | None,
    seconds: float,
    seed: int,
) -> Round:
    """Serve the configuration from a folder below ``folder``, and find the highest random-arrival rate that holds
    ``slo``.

    The search starts at ``expected`` requests/s, or at the rate of one caller if that is lower. Each probe takes
    ``seconds``, or up to five times as long if it would have fewer than 100 requests. A probe that exceeds the limit by
    up to a factor of two is repeated, because other load may have interfered. A server that does not start is a result,
    not an error.
    """
    started = time.perf_counter()

    def since() -> float:
        return time.perf_counter() - started

    try:
        with _serving(subject, choice, folder) as server:
            target = Server(server.urls.http, subject.name, subject.manifest.task)

            def ask(rate: float, seed: int) -> Measurement:
                long = min(max(seconds, FEW_SAMPLES / rate), _MOST_STRETCHED * seconds)
                return measure(target, texts, Poisson(rate), seconds=long, warmup_s=_WARMUP * seconds, seed=seed)

            def probe(rate: float) -> Measurement:
                found = ask(rate, seed)
                if found.errors or not slo.limit_ms < found.latency_ms[slo.figure] <= _NEAR * slo.limit_ms:
                    return found
                again = ask(rate, seed + _OTHER_ARRIVALS)
                return min(found, again, key=lambda m: m.latency_ms[slo.figure] if not m.errors else float("inf"))

            # Engines compile kernels for each new shape, so send many texts at once before measuring.
            measure(target, texts, ClosedLoop(_MANY), seconds=seconds, warmup_s=0, seed=seed)
            alone = measure(target, texts, ClosedLoop(1), seconds=seconds, warmup_s=0, seed=seed)
            held = None
            if not alone.errors and alone.latency_ms[slo.figure] <= slo.limit_ms:  # otherwise no rate holds the limit
                likely = min(expected or 0.5 * alone.throughput_per_s, alone.throughput_per_s)
                held = highest_rate(probe, slo.limit_ms, likely, slo.figure)
            found = held or alone
            if not found.latency_ms:
                return Round(None, {}, None, since(), f"all requests fail: {next(iter(found.error_examples), '')}")
            latency = {figure: found.latency_ms[figure] for figure in ("p50", "p90", "p99")}
            memory_mb = server.memory_mb() * 2**20 / 1e6
        return Round(
            found.scenario.rate_per_s if isinstance(found.scenario, Poisson) else None,
            latency,
            memory_mb,
            since(),
            cpu_ms=found.cpu_ms,
        )
    except ServerError as error:
        return Round(None, {}, None, since(), str(error).splitlines()[0])


@contextlib.contextmanager
def _serving(subject: Subject, choice: Configuration, folder: Path) -> Iterator[TritonServer]:
    repository = folder / f"{choice.engine}-{choice.precision}"
    model = repository / subject.name
    if not model.exists():
        if subject.export is None:
            shutil.copytree(subject.version, model / "1")
        else:
            package(
                subject.export,
                subject.name,
                repository,
                engine=choice.engine,
                precision=choice.precision,
                stream=False,
            )
    text = with_settings(subject.config, subject.manifest.task, choice.settings, str(subject.config_path))
    (model / CONFIG).write_text(text, encoding="utf-8")
    with TritonServer(
        repository, http_port=0, grpc_port=0, metrics_port=0, ready_timeout=_READY_S, drain=_DRAIN_S
    ) as server:
        yield server
