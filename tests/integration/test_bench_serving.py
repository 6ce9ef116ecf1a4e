"""Both servers of bench/translation_serving.py under load: in-flight batching, and one batch at a time."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from paths import ROOT

from deploykit.artifacts import load_manifest
from deploykit.runtime.engines import ENGINES


def test_both_servers_answer_the_same_under_the_same_arrivals(tiny_translation: Path, tmp_path: Path) -> None:
    bench: dict[str, Any] = runpy.run_path(str(ROOT / "bench" / "translation_serving.py"))
    texts = [f"Open {i} files" + ", please" * (i % 5) for i in range(12)]
    said: list[str] = []
    result = bench["measure_serving"](
        tiny_translation, tmp_path, texts, texts, rates=None, limit_ms=None, rounds=1, seconds=0.3, say=said.append
    )
    assert [c["name"] for c in result["candidates"]] == ["in-flight batching", "batch at a time"]
    metrics = []
    for candidate in result["candidates"]:
        kinds = [s["scenario"]["kind"] for s in candidate["scenarios"]]
        assert kinds == ["poisson"] * 2 + ["closed_loop"]
        assert all(s["errors"] == 0 for s in candidate["scenarios"])
        assert all(s["tokens_per_s"]["median"] > 0 for s in candidate["scenarios"])
        assert candidate["disagreements"] == 0
        assert candidate["peak_memory_mb"] > 10
        metrics.append(candidate["metrics"])
    assert metrics[0] == metrics[1]
    rates = [s["scenario"]["rate_per_s"] for s in result["candidates"][0]["scenarios"][:2]]
    assert rates == sorted(rates)
    assert "32 callers" in said[0]


@pytest.mark.skipif(not ENGINES["native"].installed, reason="native does not run here")
def test_the_shape_generates_as_many_tokens_as_the_references(
    make_tiny_translation: Callable[..., Path], tmp_path: Path
) -> None:
    bench: dict[str, Any] = runpy.run_path(str(ROOT / "bench" / "translation_serving.py"))
    example = make_tiny_translation(tmp_path / "example", precision="int8")
    task = load_manifest(example).task
    served = bench["served_shape"](example, task, example, tmp_path / "served")
    texts, lengths = bench["mixed_lengths"](served, ["the fox", "fox", "a " * 99], ["fox", "open files", "a"])
    assert texts == ["the fox", "fox"]
    result = bench["measure_serving"](
        served, tmp_path, texts, None, rates=[20.0], limit_ms=None, rounds=1, seconds=0.3, say=print, lengths=lengths
    )
    for candidate in result["candidates"]:
        assert all(s["errors"] == 0 for s in candidate["scenarios"])
        share = [s["tokens_per_s"]["median"] / s["throughput_per_s"]["median"] for s in candidate["scenarios"]]
        assert all(min(lengths) <= tokens <= max(lengths) for tokens in share)
    assert min(lengths) < max(lengths)
