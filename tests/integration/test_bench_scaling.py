"""bench/scaling.py: texts of a given number of tokens, and a quick run of all axes without a server."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from paths import ROOT

from deploykit.artifacts import load_manifest


@pytest.fixture
def scaling(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    return importlib.import_module("scaling")


@pytest.mark.parametrize("kind", ["tiny_export", "tiny_translation"])
def test_texts_of_a_length_have_exactly_that_many_tokens(
    scaling: Any, request: pytest.FixtureRequest, kind: str
) -> None:
    export: Path = request.getfixturevalue(kind)
    count = scaling.token_counter(export, load_manifest(export, "export").task)
    texts = ["Save the file before you close the window.", "w1 w2 w3", "The quick brown fox"] * 40
    for tokens in (8, 40):
        made = scaling.texts_of(tokens, texts, count)
        assert 1 <= len(made) <= 64
        assert {count(text) for text in made} == {tokens}
        assert all(text in " ".join(texts) for text in made)


def test_an_impossible_length_has_no_texts(scaling: Any) -> None:
    assert scaling.texts_of(3, ["a b c d"], lambda text: 2 * len(text.split())) == []
    assert scaling.texts_of(100, ["a b c d"], lambda text: len(text.split())) == []


def test_a_quick_run_writes_record_and_page(tiny_export: Path, tmp_path: Path) -> None:
    rows = [{"text": " ".join(f"w{i + j}" for j in range(12)), "label": "neutral"} for i in range(20)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = [tiny_export, "--data", tmp_path / "rows.jsonl", "--axes", "batch", "length", "threads", "--batches", 1, 2, 4,
             "--lengths", 8, 16, 512, "--thread-counts", 1, 2, "--rounds", 1, "--seconds", 0.05, "--warmup", 0,
             "--out", tmp_path / "scaling.json"]  # fmt: skip
    subprocess.run([sys.executable, str(ROOT / "bench" / "scaling.py"), *map(str, words)], check=True)
    suite = json.loads((tmp_path / "scaling.json").read_text(encoding="utf-8"))
    batch, length, threads = suite["workloads"]
    assert [s["scenario"]["concurrency"] for s in batch["bench"]["candidates"][0]["scenarios"]] == [1, 2, 4]
    assert length["values"] == {"8 tokens": 8, "16 tokens": 16}
    assert suite["skipped"] == {"512 tokens": "the model takes 64"}
    assert threads["values"] == {"1 thread": 1, "2 threads": 2}
    for workload in suite["workloads"]:
        for candidate in workload["bench"]["candidates"]:
            assert all(s["errors"] == 0 and s["requests"] > 0 for s in candidate["scenarios"])
    page = (tmp_path / "scaling.html").read_text(encoding="utf-8")
    for plot in ("Scaling with callers", "Scaling with length", "Scaling with threads"):
        assert plot in page


def test_the_capacity_page_is_rendered_from_the_record(tmp_path: Path) -> None:
    def scenario(kind: str, rate: float, **more: float) -> dict[str, Any]:
        spread = {"median": rate, "min": 0.9 * rate, "max": 1.1 * rate}
        latency = {"p50": {"median": 5.0}, "p99": {"median": 40.0}}
        return {"scenario": {"kind": kind, "name": kind, **more}, "throughput_per_s": spread, "latency_ms": latency}

    def candidate(name: str, rate: float) -> dict[str, Any]:
        found = [scenario("1 caller", rate), scenario("p99_within", rate, limit_ms=50)]
        return {"name": name, "scenarios": found, "peak_memory_mb": 300.0}

    bench = {
        "candidates": [candidate("1 instance", 60.0), candidate("2 instances", 100.0)],
        "settings": {"rounds": 3}, "texts": {"rows": 9, "mean_chars": 80.0},
    }  # fmt: skip
    values = {"1 instance": 1, "2 instances": 2}
    suite = {
        "started": "2026-11-25T00:00:00", "command": "python bench/scaling.py e",
        "machine": {"cpu": "AMD EPYC", "cpus_usable": 2, "memory_gb": 8.0},
        "workloads": [{"key": key, "axis": key, "values": values, "bench": bench} for key in ("instances", "models")],
    }  # fmt: skip
    calls = [scenario("closed_loop", 70.0, concurrency=4), scenario("closed_loop", 90.0, concurrency=16)]
    batch = {"candidates": [{"name": "e", "scenarios": calls, "peak_memory_mb": 300.0}]}
    suite["workloads"] = [{"key": "batch", "bench": batch}, *suite["workloads"]]  # type: ignore[misc]
    record = tmp_path / "x-scaling.json"
    record.write_text(json.dumps(suite))
    words = [record, "--out", tmp_path / "capacity.md"]
    subprocess.run([sys.executable, str(ROOT / "bench" / "nodes.py"), *map(str, words)], check=True)
    page = (tmp_path / "capacity.md").read_text()
    assert (
        "**100 requests a second** of one text, arriving at random, with p99 within 50 ms (90 to 110 in 3 rounds)"
        in page
    )
    assert "served with 2 instances in 300 MB" in page
    for row in (
        "| 10 | 2 |",
        "| 100 | 3 |",
        "| 1,000 | 13 |",
        "| 10,000 | 113 |",
        "| 2 | 100 | 5.0 | 40.0 | 100 | 5.0 | 40.0 | 300 |",
        "| 16 | 90 | 5.0 | 40.0 |",
    ):
        assert row in page, row
    assert "## Models of one server, of which one is asked" in page
    assert "## Texts of one call" in page
    assert "hours" not in page.lower()
