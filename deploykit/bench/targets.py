"""Open the targets that a user names as candidates: directories, and models on a server."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploykit.artifacts import load_manifest
from deploykit.bench.run import DEFAULT_SCENARIOS, BenchResult, Candidate, run_bench
from deploykit.bench.scenarios import Scenario, Server
from deploykit.bench.separate_process import ProcessMeasurement, answer_alone, measure_alone
from deploykit.peak_memory import require_psutil
from deploykit.runtime.engines import ENGINES
from deploykit.runtime.find_graphs import find_graphs
from deploykit.runtime.generation import Generation
from deploykit.tasks.opening import open_predictor
from deploykit.tasks.protocol import Predictor
from deploykit.tasks.registry import task_of


def bench_targets(
    targets: Sequence[str],
    texts: Sequence[str],
    truth: Sequence[str] | None = None,
    *,
    url: str,
    generation: Mapping[str, Any] = {},
    engines: Sequence[str] = ("auto",),
    precisions: Sequence[str] = ("auto",),
    threads: int | None = None,
    scenarios: Sequence[Scenario] = DEFAULT_SCENARIOS,
    rounds: int = 3,
    seconds: float = 5.0,
    warmup_s: float = 1.0,
    seed: int = 0,
    memory: bool = True,
    progress: Callable[[str], None] = lambda message: None,
) -> BenchResult:
    """Open each target and measure them all: directories of any kind, or names of models at ``url``.

    An export is measured once for each combination of ``engines`` and ``precisions``. ``generation`` are search
    parameters of a translator, as ``override`` takes them. Without ``memory``, that of several models here is not measured.
    """
    require_psutil()
    plans = [plan for target in targets for plan in _plans(target, engines, precisions)]
    local = [plan for plan in plans if not plan.served]
    candidates = []
    try:
        for plan in plans:
            progress(f"opening {plan.name}")
            # Memory is measured in separate processes, because the candidates' shares of one process cannot be separated.
            alone = _alone(plan, threads, texts, generation) if memory and not plan.served and len(local) > 1 else None
            candidates.append(_open(plan, url, threads, generation, alone))
        return run_bench(
            candidates,
            texts,
            truth,
            scenarios,
            rounds=rounds,
            seconds=seconds,
            warmup_s=warmup_s,
            seed=seed,
            progress=progress,
        )
    finally:
        for candidate in candidates:
            if not isinstance(candidate.target, Server):
                candidate.target.close()


@dataclass(frozen=True)
class _Plan:
    """A candidate that has not been opened yet."""

    name: str
    target: str
    served: bool
    engine: str
    precision: str
    size_mb: float | None = None


def _plans(target: str, engines: Sequence[str], precisions: Sequence[str]) -> Iterator[_Plan]:
    path = Path(target)
    if not path.exists() and "/" not in target:
        yield _Plan(f"{target} (served)", target, True, "auto", "auto")
        return
    manifest = load_manifest(path) if (path / "manifest.json").exists() else None
    if manifest is None or manifest.kind == "checkpoint":
        weights = sum(p.stat().st_size for p in path.glob("*.safetensors"))
        yield _Plan(f"{path.name} torch", target, False, "torch", "fp32", weights / 1e6 or None)
        return
    seen = set()
    for engine, precision in itertools.product(engines, precisions):
        graphs = find_graphs(path, manifest, engine=engine, precision=precision)
        if graphs not in seen:
            seen.add(graphs)
            size = sum(manifest.files[file].bytes for file in graphs.files) / 1e6
            name = f"{path.name} {graphs.engine} {graphs.precision}"
            yield _Plan(name, target, False, graphs.engine, graphs.precision, size)


def _open(
    plan: _Plan, url: str, threads: int | None, generation: Mapping[str, Any], alone: ProcessMeasurement | None
) -> Candidate:
    if plan.served:
        served = open_predictor(plan.target, url=url)
        served.close()
        target = Server(url, plan.target, served.task)
        return Candidate(plan.name, target, generation=task_of(served.task).override(served.task, generation))
    predictor = _predictor(plan.target, plan.engine, plan.precision, threads)
    return Candidate(
        plan.name,
        predictor,
        plan.size_mb,
        plan.precision,
        plan.engine,
        alone.peak_memory_mb if alone else None,
        alone.first_answer_s if alone else None,
        task_of(predictor.task).override(predictor.task, generation),
    )


def _predictor(target: str, engine: str, precision: str, threads: int | None) -> Predictor:
    if engine not in ENGINES:
        engine, precision = "auto", "auto"
    return open_predictor(target, url="", engine=engine, precision=precision, threads=threads)


def _alone(
    plan: _Plan, threads: int | None, texts: Sequence[str], generation: Mapping[str, Any]
) -> ProcessMeasurement | None:
    job = {
        "target": plan.target,
        "engine": plan.engine,
        "precision": plan.precision,
        "threads": threads,
        "generation": dict(generation),
    }
    return measure_alone(["-c", "from deploykit.bench.targets import _alone_job; _alone_job()"], job, texts)


def _alone_job() -> None:
    """Open and answer in the separate process of ``_alone``."""

    def open_job(job: Mapping[str, Any]) -> tuple[Predictor, Generation | None]:
        predictor = _predictor(job["target"], job["engine"], job["precision"], job["threads"])
        return predictor, task_of(predictor.task).override(predictor.task, job["generation"])

    answer_alone(open_job)
