"""In-flight batching beside a batch at a time: both servers of bench/translation_serving.py, under load."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def test_both_servers_answer_the_same_under_the_same_arrivals(tiny_translation: Path, tmp_path: Path) -> None:
    bench: dict[str, Any] = runpy.run_path(str(ROOT / "bench" / "translation_serving.py"))
    texts = [f"Open {i} files" + ", please" * (i % 5) for i in range(12)]
    said: list[str] = []
    result = bench["measure_serving"](
        tiny_translation, tmp_path, texts, texts, rates=None, rounds=1, seconds=0.3, say=said.append
    )
    assert [c["name"] for c in result["candidates"]] == ["in-flight batching", "batch at a time"]
    metrics = []
    for candidate in result["candidates"]:
        kinds = [s["scenario"]["kind"] for s in candidate["scenarios"]]
        assert kinds == ["poisson"] * 4 + ["closed_loop"]
        assert all(s["errors"] == 0 for s in candidate["scenarios"])
        assert all(s["tokens_per_s"]["median"] > 0 for s in candidate["scenarios"])
        assert candidate["disagreements"] == 0
        assert candidate["peak_memory_mb"] > 10
        metrics.append(candidate["metrics"])
    assert metrics[0] == metrics[1]
    rates = [s["scenario"]["rate_per_s"] for s in result["candidates"][0]["scenarios"][:4]]
    assert rates == sorted(rates)
    assert "32 callers" in said[0]
