"""The arithmetic of bench/generation.py, and its records."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest


class Opened:
    """A worker that is not running."""

    note, size_mb, open_s, peak_memory_mb = "as always", 1.5, 0.5, 100.0

    def __init__(self, contender: Any) -> None:
        self.contender = contender


def rounds(*decode: float | None, ids: Any = ((1, 2, 3),)) -> list[dict[str, Any]]:
    return [{"prefill": 10.0, "decode": {8: value}, "whole": {8: 2.0}, "ids": ids} for value in decode]


def test_decoding_is_what_more_tokens_take_longer_than_one(bench: Any) -> None:
    decode = bench("generation").decode_tokens_per_s
    assert decode(8, 64, 1.0, 3.0) == 8 * 63 / 2
    assert decode(1, 2, 0.5, 0.75) == 4
    assert decode(1, 64, 1.0, 0.9) is None


def test_a_record_has_median_and_range_of_all_rounds(bench: Any) -> None:
    generation = bench("generation")
    base, other = Opened(generation.BASE), Opened(next(c for c in generation.CONTENDERS if c.name == "deploykit int8"))
    record = generation.summary({base: rounds(4.0, 6.0, 5.0), other: rounds(None, 9.0, None, ids=((1, 2, 4),))})
    assert record["key"] == "process"
    first, second = record["contenders"]
    assert first["name"] == "transformers fp32"
    assert first["decode_tokens_per_s"] == {"8": {"median": 5.0, "min": 4.0, "max": 6.0}}
    assert first["tokens_as_base"] == 1.0
    assert second["name"] == "deploykit int8"
    assert second["decode_tokens_per_s"] == {"8": {"median": 9.0, "min": 9.0, "max": 9.0}}
    assert second["tokens_as_base"] == pytest.approx(2 / 3)
    assert generation.summary({other: rounds(None)})["contenders"][0]["decode_tokens_per_s"] == {"8": None}


def test_tokens_after_the_first_that_differs_do_not_count_as_equal(bench: Any) -> None:
    share = bench("generation").equal_share
    assert share(rounds(1.0, ids=[[1, 9, 3, 4], [5, 6, 7, 8]]), rounds(1.0, ids=[[1, 2, 3, 4], [5, 6, 7, 8]])) == 5 / 8


def test_prompts_have_the_length_that_is_asked(bench: Any, tmp_path: Path, tiny_export: Path) -> None:
    prompts = bench("generation").Prompts(tiny_export)
    found = prompts.ids(3, 20)
    assert [len(ids) for ids in found] == [20, 20, 20]
    assert len({tuple(ids) for ids in found}) >= 1
    assert len(prompts.texts(2, 5)) == 2


def test_peers_without_their_environment_are_missing_with_the_remedy(bench: Any, tmp_path: Path) -> None:
    contenders = bench("generation_contenders")
    reasons = {c.name: contenders.missing(c, tmp_path / "python") for c in contenders.CONTENDERS}
    assert "make generation-peers" in reasons["llama.cpp q8_0"]
    assert reasons["deploykit int8"] is None
    llama = next(c for c in contenders.CONTENDERS if c.engine == contenders.LLAMA)
    assert "xllamacpp is not installed" in contenders.missing(llama, Path(sys.executable))


def test_a_worker_that_fails_tells_its_last_line(bench: Any, tmp_path: Path) -> None:
    contenders = bench("generation_contenders")
    files = {"folder": str(tmp_path / "nowhere"), "size_mb": 0.0}
    with pytest.raises(Exception, match=r"CTranslate2 int8: .*nowhere"):
        contenders.Worker(contenders.CONTENDERS[-1], files, 1, 64)


def test_the_table_has_ratios_to_transformers_and_says_when_the_machine_was_busy(bench: Any) -> None:
    generation, serving, table = map(bench, ("generation", "generation_serving", "table"))
    base, other = Opened(generation.BASE), Opened(next(c for c in generation.CONTENDERS if c.name == "deploykit int8"))
    load = serving.StreamLoad(8, 16, 1024, 50.0, 100.0, 200.0, 20.0, 30.0)
    suite = {
        "started": "2026-01-02T00:00:00", "machine": {"cpu": "CPU", "cpus_usable": 2}, "threads": 2,
        "settings": {"rounds": 3, "batches": [8], "prefill_tokens": 512, "prompt_tokens": 32, "new_tokens": 64},
        "load_before": [{"cpu_percent": 3.0}],
        "workloads": [
            generation.summary({base: rounds(4.0, 6.0, 5.0), other: rounds(10.0, 5.0)}),
            {"key": "served", "loads": [serving.summary(server, [load, load]) for server in serving.SERVERS]},
        ],
    }  # fmt: skip
    text = table.render_generation(suite)
    assert "| transformers fp32 | 10 tokens/s | 5 (4 to 6) tokens/s | 100% | 1.5 | 100 |" in text
    assert "| deploykit int8 | 1.00 | 1.50 (1.00 to 2.00) | 100% | 1.5 | 100 |" in text
    for server in ("deploykit int8", "deploykit fp32", "llama.cpp q8_0"):
        assert f"| {server}, 8 clients | 50 | 100 | 200 | 20 | 30 |" in text
    assert "not final" not in text
    assert "not final" in table.render_generation({**suite, "load_before": [{"cpu_percent": 99.0}]})


def test_a_part_is_added_to_a_record(bench: Any) -> None:
    def record(key: str, package: str) -> dict[str, Any]:
        return {"workloads": [{"key": key}], "skipped": {key: "why"}, "machine": {"packages": {package: "1"}},
                "load_before": [{"cpu_percent": 0.0}], "started": f"when {key}", "command": key}  # fmt: skip

    keep = bench("generation").keep_other_parts
    suite = record("served", "b") | {"workloads": []}
    keep(suite, record("process", "a"), ("served",))
    assert suite["workloads"] == [{"key": "process"}]
    assert suite["machine"]["packages"] == {"a": "1", "b": "1"}
    assert len(suite["load_before"]) == 2
    assert suite["earlier"] == [{"started": "when process", "command": "process"}]
    again = record("process", "a") | {"workloads": []}
    keep(again, suite, ("process",))
    assert [each["started"] for each in again["earlier"]] == ["when process", "when served"]
