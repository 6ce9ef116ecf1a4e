"""The arithmetic of bench/soak.py."""

from __future__ import annotations

from typing import Any

import pytest


def samples(bench: Any, memory: list[float], files: list[int] | None = None, left: int = 0) -> list[Any]:
    """One a minute, and a last one with ``left`` answers still running."""
    sample = bench("soak").Sample
    found = [sample(60.0 * i, mb, (files or [50] * len(memory))[i], 8, 2) for i, mb in enumerate(memory)]
    return [*found, sample(60.0 * len(memory), memory[-1], 50, left, 0)]


def test_memory_that_stays_level_after_the_start_passes(bench: Any) -> None:
    load = bench("soak")
    memory = [500.0, 700, 900, *(1000 + 15 * (i % 3) for i in range(57))]
    found = load.verdict(samples(bench, memory), {"stream: as expected": 900})
    assert found["reasons"] == []
    assert abs(found["memory_mb_per_hour"]) < 20


def test_memory_and_files_that_grow_fail(bench: Any) -> None:
    load = bench("soak")
    leaking = samples(bench, [1000.0 + 5 * i for i in range(60)], [50 + i for i in range(60)])
    found = load.verdict(leaking, {})
    assert found["memory_mb_per_hour"] == pytest.approx(300)
    assert found["open_files_per_hour"] == pytest.approx(60)
    assert [reason.split(":")[0] for reason in found["reasons"]] == ["memory grows", "open files grow"]


def test_a_peak_is_no_growth(bench: Any) -> None:
    memory = [1000.0] * 60
    memory[40] = 3000
    assert bench("soak").verdict(samples(bench, memory), {})["reasons"] == []


def test_answers_left_behind_and_wrong_answers_fail(bench: Any) -> None:
    outcomes = {"bad: as expected": 7, "bad: status 500: oh": 2}
    found = bench("soak").verdict(samples(bench, [1000.0] * 8, left=1), outcomes)
    assert found["reasons"] == [
        "1 answers run and 0 wait after the last client left", "2 requests: bad: status 500: oh"
    ]  # fmt: skip


def minutes(p99: list[float]) -> list[dict[str, Any]]:
    return [{"minute": at, "classify": {"answers": 9, "p99_ms": each}} for at, each in enumerate(p99)]


def test_latencies_that_grow_fail(bench: Any) -> None:
    soak, level = bench("soak"), samples(bench, [1000.0] * 8)
    assert soak.verdict(level, {}, minutes([90.0, 20, 22, 21, 60, 22, 20, 21, 22, 5]))["reasons"] == []
    found = soak.verdict(level, {}, minutes([10.0 + 5 * at for at in range(12)]))["reasons"]
    assert found == ["classify: p99 grows by 35 ms, its median is 42 ms"]
    assert soak.verdict(level, {}, minutes([10.0, 20, 40]))["reasons"] == []


def test_answers_are_counted_by_minute_and_kind(bench: Any) -> None:
    found = bench("soak").by_minute([(1.0, "classify", 5.0), (2.0, "classify", 7.0), (61.0, "stream", 9.0)])
    assert found == [
        {"minute": 0, "classify": {"answers": 2, "p50_ms": 6.0, "p99_ms": pytest.approx(6.98)}},
        {"minute": 1, "stream": {"answers": 1, "p50_ms": 9.0, "p99_ms": 9.0}},
    ]
