"""What a user names, opened as candidates: directories, and models on a server."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from deploykit.artifacts import load_manifest
from deploykit.bench.load import Scenario, Server
from deploykit.bench.machine import PeakMemory, require_psutil
from deploykit.bench.run import DEFAULT_SCENARIOS, BenchResult, Candidate, run_bench
from deploykit.predictor import Predictor, find_graphs, open_predictor
from deploykit.runtime.engines import ENGINES

_MEMORY_TEXTS = 256


def bench_targets(
    targets: Sequence[str],
    texts: Sequence[str],
    labels: Sequence[str] | None = None,
    *,
    url: str,
    engines: Sequence[str] = ("auto",),
    precisions: Sequence[str] = ("auto",),
    threads: int | None = None,
    scenarios: Sequence[Scenario] = DEFAULT_SCENARIOS,
    rounds: int = 3,
    seconds: float = 5.0,
    warmup_s: float = 1.0,
    seed: int = 0,
    progress: Callable[[str], None] = lambda message: None,
) -> BenchResult:
    """Open each target and measure them all: directories of any kind, or names of models at ``url``.

    An export is measured once for each combination of ``engines`` and ``precisions``.
    """
    require_psutil()
    plans = [plan for target in targets for plan in _plans(target, engines, precisions)]
    local = [plan for plan in plans if not plan.served]
    candidates = []
    try:
        for plan in plans:
            progress(f"opening {plan.name}")
            # Side by side in one process, the memory of each could not be told from the others'.
            memory = _memory_alone(plan, threads, texts) if not plan.served and len(local) > 1 else None
            candidates.append(_open(plan, url, threads, memory))
        return run_bench(
            candidates,
            texts,
            labels,
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
    """A candidate not opened yet."""

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


def _open(plan: _Plan, url: str, threads: int | None, memory: float | None) -> Candidate:
    if plan.served:
        return Candidate(plan.name, Server(url, plan.target))
    predictor = _predictor(plan.target, plan.engine, plan.precision, threads)
    return Candidate(plan.name, predictor, plan.size_mb, plan.precision, plan.engine, memory)


def _predictor(target: str, engine: str, precision: str, threads: int | None) -> Predictor:
    if engine not in ENGINES:
        engine, precision = "auto", "auto"
    return open_predictor(target, url="", engine=engine, precision=precision, threads=threads)


def _memory_alone(plan: _Plan, threads: int | None, texts: Sequence[str]) -> float | None:
    """Peak memory, in 1e6 bytes, of a fresh process that opens the candidate and answers 256 texts."""
    job = {
        "target": plan.target,
        "engine": plan.engine,
        "precision": plan.precision,
        "threads": threads,
        "texts": list(texts[:_MEMORY_TEXTS]),
    }
    child = subprocess.run(
        [sys.executable, "-c", "from deploykit.bench.targets import _memory_job; _memory_job()"],
        input=json.dumps(job),
        capture_output=True,
        text=True,
        check=False,
    )
    return float(child.stdout.split()[-1]) if child.returncode == 0 else None


def _memory_job() -> None:
    """The other side of ``_memory_alone``."""
    job = json.load(sys.stdin)
    with PeakMemory(None) as memory:
        predictor = _predictor(job["target"], job["engine"], job["precision"], job["threads"])
        for start in range(0, len(job["texts"]), 64):
            predictor.scores(job["texts"][start : start + 64])
    print(memory.peak_mb)
