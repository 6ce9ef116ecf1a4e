"""Functions that the suites under bench/ share."""

from __future__ import annotations

import contextlib
import datetime
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

from deploykit.artifacts import new_file
from deploykit.bench.machine import describe_machine
from deploykit.bench.run import Candidate
from deploykit.bench.separate_process import ProcessMeasurement, measure_alone
from deploykit.report.pages import write_report
from deploykit.runtime.generation import Generation
from deploykit.tasks.opening import Predictor


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def begin(program: str, threads: int, skipped: Mapping[str, str], packages: Sequence[str]) -> dict[str, Any]:
    """Return the record of a run that starts now. ``packages`` are those of the peers, whose versions it records."""
    machine = describe_machine()
    for package in packages:
        with contextlib.suppress(PackageNotFoundError):
            machine["packages"][package] = version(package)
    return {
        "schema": 1,
        "started": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["python", f"bench/{program}", *sys.argv[1:]]),
        "threads": threads,
        "machine": machine,
        "skipped": dict(skipped),
        "workloads": [],
    }


class Contender(Protocol):
    """A contender, as the suites' own modules define it."""

    @property
    def name(self) -> str: ...

    @property
    def engine(self) -> str: ...

    @property
    def precision(self) -> str: ...


def measured_alone(
    contender: Contender,
    module: str,
    hidden: Sequence[str],
    job: Mapping[str, Any],
    texts: Sequence[str],
    *,
    times: int,
) -> ProcessMeasurement | None:
    """Measure a contender in separate processes. Returns the run with the median time to first answer, or None if all
    fail.

    ``module`` defines the contender; its ``open_job`` gets ``job``. ``hidden`` packages cannot be imported there.
    """
    program = [str(Path(__file__).with_name("alone.py")), module, *hidden]
    runs = [measure_alone(program, job, texts) for _ in range(times)]
    whole = sorted((run for run in runs if run is not None), key=lambda run: run.first_answer_s)
    if not whole:
        say(f"warning: {contender.name} fails in a process of its own")
        return None
    return whole[len(whole) // 2]


def candidate(
    contender: Contender,
    target: Predictor,
    size_mb: float,
    alone: ProcessMeasurement | None,
    generation: Generation | None = None,
) -> Candidate:
    """Return ``target`` as a candidate, with the figures that were measured alone."""
    return Candidate(
        contender.name,
        target,
        size_mb,
        contender.precision,
        contender.engine,
        alone.peak_memory_mb if alone else None,
        alone.first_answer_s if alone else None,
        generation,
    )


def write_record(suite: Mapping[str, Any], out: Path) -> None:
    """Write a record that has no page."""
    with new_file(out) as file:
        file.write_text(json.dumps(suite, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    say(f"{out}: written")


def write(suite: Mapping[str, Any], out: Path) -> None:
    """Write ``out`` and its page next to it."""
    with new_file(out) as file:
        file.write_text(json.dumps(suite, indent=1, ensure_ascii=False), encoding="utf-8")
    write_report(suite, out.with_suffix(".html"))
    say(f"{out}: written")
