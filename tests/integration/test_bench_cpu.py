"""``measure`` says what a request costs each process of a server, and the engine in it."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest
from served import family, start

from deploykit.artifacts import load_manifest
from deploykit.bench.load import measure
from deploykit.bench.run import Candidate, run_bench
from deploykit.bench.scenarios import ClosedLoop, Server
from deploykit.cli.bench import _table
from deploykit.report.record import own_cpu_ms
from deploykit.triton.repository import package

TEXTS = [f"w{i} " * (1 + i % 40) for i in range(60)]


def _seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def test_the_cpu_time_of_a_request_by_process(tiny_export: Path, tmp_path: Path) -> None:
    package(tiny_export, "tiny", tmp_path, engine="onnxruntime", precision="fp32")
    package(tiny_export, "other", tmp_path, engine="onnxruntime", precision="fp32")
    with start(tmp_path) as server:
        target = Server(server.urls.http, "tiny", load_manifest(tiny_export).task)
        measure(target, TEXTS, ClosedLoop(8), seconds=0.5, warmup_s=0)
        before = {process: _seconds(process) for process in family(server)}
        found = measure(target, TEXTS, ClosedLoop(8), seconds=3.0, warmup_s=0)
        spent = 1e3 * sum(_seconds(process) - begun for process, begun in before.items()) / found.requests
        record = run_bench(
            [Candidate("tiny (served)", target)], TEXTS, scenarios=[ClosedLoop(2)], rounds=2, seconds=0.5
        )
    assert found.errors == 0
    assert found.cpu_ms is not None
    assert found.cpu_ms.keys() == {"client", "triton", "model", "tokenizer", "engine"}
    assert all(each > 0 for each in found.cpu_ms.values())
    assert found.cpu_ms["client"] == found.generator_cpu_ms
    assert found.cpu_ms["tokenizer"] + found.cpu_ms["engine"] < found.cpu_ms["model"]
    # "other" is idle, so the two shares are nearly all that the server used.
    assert found.cpu_ms["triton"] + found.cpu_ms["model"] == pytest.approx(spent, rel=0.2)
    own = own_cpu_ms(found.cpu_ms)
    assert own is not None
    assert 0 < own < spent
    candidates = record.to_json()["candidates"]
    assert {"median", "min", "max"} == set(candidates[0]["scenarios"][0]["cpu_ms"]["engine"])
    [line] = [line for line in _table(candidates) if "CPU ms a request" in line]
    assert "all but client and engine" in line


def test_a_server_elsewhere_has_no_cpu_time() -> None:
    from deploykit.bench.server_cpu import ServerCpu

    with ServerCpu([], "tiny") as cpu:
        pass
    assert cpu.per_request_ms(5) is None
