"""Candidates side by side: order, summaries, JSON."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from bench_oracle import LABELS, TEXTS, Oracle
from click.testing import CliRunner
from numpy.typing import NDArray

from deploykit.bench.run import BenchResult, Candidate, run_bench
from deploykit.bench.scenarios import ClosedLoop, Poisson
from deploykit.bench.targets import bench_targets
from deploykit.cli import main
from deploykit.errors import DataError, UsageError


def run(*candidates: Candidate, labels: Sequence[str] | None = LABELS, rounds: int = 2) -> BenchResult:
    scenarios = (ClosedLoop(1), ClosedLoop(4), Poisson(300.0))
    return run_bench(candidates, TEXTS, labels, scenarios, rounds=rounds, seconds=0.05, warmup_s=0)


def test_json_has_the_documented_keys_and_survives_a_round_trip() -> None:
    result = run(Candidate("oracle", Oracle("a"), size_mb=1.5, precision="fp32", engine="none")).to_json()
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert set(result) == {
        "schema", "started", "headline", "throughput_per_s", "tokens_per_s", "latency_ms", "requests", "errors", "peak_memory_mb",
        "metrics", "candidates", "texts", "settings", "machine", "other_load", "warnings",
    }  # fmt: skip
    assert result["schema"] == 1
    assert set(result["latency_ms"]) == {"p50", "p90", "p99"}
    assert result["latency_ms"]["p50"] <= result["latency_ms"]["p90"] <= result["latency_ms"]["p99"]
    assert result["errors"] == 0
    assert result["peak_memory_mb"] > 10
    assert result["metrics"]["accuracy"] == 1.0
    assert result["texts"] == {"rows": 4, "mean_chars": 4.2}
    assert len(result["other_load"]) == 2
    (candidate,) = result["candidates"]
    assert candidate["disagreements"] == 0
    assert candidate["labels"] == ["no", "yes"]
    headline = next(s for s in candidate["scenarios"] if s["scenario"]["name"] == candidate["headline"])
    assert headline["scenario"]["kind"] == "closed_loop"
    assert result["throughput_per_s"] == headline["throughput_per_s"]["median"]
    for scenario in candidate["scenarios"]:
        spread = scenario["throughput_per_s"]
        assert spread["min"] <= spread["median"] <= spread["max"]
        assert sum(scenario["histogram"]["counts"]) == scenario["requests"] - scenario["errors"]
        assert len(scenario["histogram"]["edges_ms"]) == len(scenario["histogram"]["counts"]) + 1


def test_models_are_compared_on_the_same_texts() -> None:
    class Wrong(Oracle):
        def scores(self, texts: Sequence[str]) -> NDArray[np.float32]:
            return 1 - super().scores(texts)

    first, second = run(Candidate("right", Oracle("a")), Candidate("wrong", Wrong("b"))).to_json()["candidates"]
    assert first["differences"] is None
    assert second["differences"]["accuracy"] == {"difference": -1.0, "interval": [-1.0, -1.0], "beyond_noise": True}
    assert second["metrics"]["intervals"]["accuracy"] == [0.0, 0.0]


def test_candidates_take_turns_within_each_round() -> None:
    calls: list[str] = []
    run(Candidate("a", Oracle("a", calls)), Candidate("b", Oracle("b", calls)), labels=None)
    turns = [name for i, name in enumerate(calls) if i == 0 or calls[i - 1] != name]
    assert turns == ["a", "b"] * 6  # 3 scenarios, 2 rounds


def test_without_labels_there_are_no_metrics() -> None:
    result = run(Candidate("oracle", Oracle("a")), labels=None).to_json()
    assert result["metrics"] is None
    assert result["candidates"][0]["disagreements"] is None


def test_memory_of_several_models_in_one_process_is_not_reported() -> None:
    result = run(Candidate("a", Oracle("a")), Candidate("b", Oracle("b"), peak_memory_mb=12.0), rounds=1).to_json()
    assert [c["peak_memory_mb"] for c in result["candidates"]] == [None, 12.0]


def test_answers_that_change_under_load_are_noticed() -> None:
    result = run(Candidate("fickle", Oracle("a", change=True)), rounds=1)
    assert result.candidates[0].disagreements == 4
    assert any("answered differently under load" in warning for warning in result.warnings)


def test_a_label_that_the_model_lacks_is_a_data_error() -> None:
    with pytest.raises(DataError, match="maybe"):
        run(Candidate("oracle", Oracle("a")), labels=["yes", "no", "maybe", "no"])


def test_wrong_calls_are_refused() -> None:
    with pytest.raises(UsageError, match="3 correct answers"):
        run(Candidate("oracle", Oracle("a")), labels=LABELS[:3])
    with pytest.raises(UsageError, match="no model or no scenario"):
        run()
    with pytest.raises(DataError, match="no texts"):
        run_bench([Candidate("oracle", Oracle("a"))], [])


def test_a_candidate_may_have_texts_of_its_own() -> None:
    class Listens(Oracle):
        def scores(self, texts: Sequence[str]) -> NDArray[np.float32]:
            heard.update(texts)
            return super().scores(texts)

    heard: set[str] = set()
    candidate = Candidate("listens", Listens("a"), texts=["maybe"])
    run_bench([candidate], TEXTS, scenarios=[ClosedLoop(2)], rounds=1, seconds=0.05, warmup_s=0)
    assert heard == {"maybe"}
    with pytest.raises(UsageError, match="no correct answers"):
        run(candidate)


def test_an_export_is_measured_with_each_engine_and_precision(tiny_export: Path) -> None:
    told: list[str] = []
    result = bench_targets(
        [str(tiny_export)],
        ["w1 w2", "w3"],
        url="http://127.0.0.1:1",
        engines=("onnxruntime",),
        precisions=("fp32", "int8", "auto"),  # auto is int8 once more
        scenarios=(ClosedLoop(2),),
        rounds=1,
        seconds=0.1,
        warmup_s=0,
        progress=told.append,
    ).to_json()
    names = [c["name"] for c in result["candidates"]]
    assert names == [f"{tiny_export.name} onnxruntime fp32", f"{tiny_export.name} onnxruntime int8"]
    assert all(c["peak_memory_mb"] > 10 and c["size_mb"] > 0 for c in result["candidates"])
    assert result["errors"] == 0
    assert told


def test_the_result_says_how_to_repeat_it(tiny_export: Path, tmp_path: Path) -> None:
    (tmp_path / "my rows.jsonl").write_text('{"text": "w1 w2"}\n')
    words = ["bench", str(tiny_export), "--data", str(tmp_path / "my rows.jsonl"), "--max-concurrency", "1", "--rounds", "1",
             "--seconds", "0.05", "--json"]  # fmt: skip
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["command"] == shlex.join(["deploykit", *words])
