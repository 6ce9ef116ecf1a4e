"""Comparing two records beyond the noise, with the command."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from bench_oracle import LABELS, TEXTS, Oracle
from click.testing import CliRunner, Result
from paths import ROOT

from deploykit.bench.compare import compare
from deploykit.bench.run import Candidate, run_bench
from deploykit.bench.scenarios import ClosedLoop
from deploykit.cli import main
from deploykit.report.record import read_record, results_of

Record = dict[str, Any]


def spread(middle: float, half: float = 0.0) -> dict[str, float]:
    return {"median": middle, "min": middle - half, "max": middle + half}


@pytest.fixture(scope="module")
def measured() -> Record:
    """A real record of three rounds, whose scenario figures tests overwrite."""
    candidates = [Candidate("model", Oracle("a"), peak_memory_mb=100.0)]
    settings: Any = {"rounds": 3, "seconds": 0.05, "warmup_s": 0}
    record: Record = json.loads(json.dumps(run_bench(candidates, TEXTS, LABELS, [ClosedLoop(4)], **settings).to_json()))
    record["warnings"] = []
    return record


def changed(record: Record, throughput: dict[str, float], p50: dict[str, float]) -> Record:
    record = copy.deepcopy(record)
    (scenario,) = record["candidates"][0]["scenarios"]
    scenario["throughput_per_s"], scenario["latency_ms"]["p50"] = throughput, p50
    return record


def verdicts(old: Record, new: Record) -> dict[str, str]:
    return {change.figure: change.verdict for change in compare(old, new).changes}


def write(folder: Path, **records: Any) -> list[str]:
    for name, record in records.items():
        (folder / f"{name}.json").write_text(json.dumps(record), encoding="utf-8")
    return [str(folder / f"{name}.json") for name in records]


def typed(*words: object) -> Result:
    return CliRunner().invoke(main, ["bench", *map(str, words)])


def compared(*words: object) -> Result:
    return CliRunner().invoke(main, ["compare", *map(str, words)])


def test_disjoint_ranges_with_distant_medians_are_a_change(measured: Record) -> None:
    old = changed(measured, spread(100, 5), spread(10, 1))
    new = changed(measured, spread(150, 5), spread(20, 1))
    found = {change.figure: change for change in compare(old, new).changes}
    assert found["throughput"].verdict == "faster"
    assert found["throughput"].ratio == pytest.approx(1.5)
    assert found["p50"].verdict == "slower"
    assert found["p50"].ratio == pytest.approx(2.0)
    assert verdicts(new, old) | {"p99": ""} == {
        "throughput": "slower", "p50": "faster", "p99": "", "memory": "no difference", "macro-F1": "no difference"
    }  # fmt: skip


def test_ranges_that_overlap_and_small_changes_are_noise(measured: Record) -> None:
    old = changed(measured, spread(100, 30), spread(10))
    new = changed(measured, spread(150, 30), spread(10.4))  # the one overlaps, the other moves by 4%
    assert {figure: verdicts(old, new)[figure] for figure in ("throughput", "p50")} == {
        "throughput": "no difference", "p50": "no difference"
    }  # fmt: skip


def test_two_rounds_are_too_few_for_a_verdict(measured: Record) -> None:
    new = changed(measured, spread(1000), spread(1))
    new["settings"]["rounds"] = 2
    assert verdicts(measured, new)["throughput"] == "too few rounds"


def test_memory_and_accuracy_have_their_own_bounds(measured: Record) -> None:
    new = copy.deepcopy(measured)
    new["candidates"][0]["peak_memory_mb"] = 94.0
    del new["candidates"][0]["metrics"]["intervals"]
    new["candidates"][0]["metrics"]["macro_f1"] = 0.994
    assert verdicts(measured, new) | {"throughput": "", "p50": "", "p99": ""} == {
        "throughput": "", "p50": "", "p99": "", "memory": "less", "macro-F1": "lower"
    }  # fmt: skip
    new["candidates"][0]["peak_memory_mb"] = 104.0
    new["candidates"][0]["metrics"]["macro_f1"] = 0.996
    assert {verdicts(measured, new)[figure] for figure in ("memory", "macro-F1")} == {"no difference"}


def test_an_accuracy_differs_by_more_than_its_intervals_allow(measured: Record) -> None:
    old, new = copy.deepcopy(measured), copy.deepcopy(measured)
    old["candidates"][0]["metrics"] |= {"macro_f1": 0.80, "intervals": {"macro_f1": [0.77, 0.83]}}
    new["candidates"][0]["metrics"] |= {"macro_f1": 0.76, "intervals": {"macro_f1": [0.72, 0.80]}}
    assert verdicts(old, new)["macro-F1"] == "within noise"
    assert "0.8000 (0.7700 to 0.8300) -> 0.7600 (0.7200 to 0.8000)" in compare(old, new).to_text()
    new["candidates"][0]["metrics"] |= {"macro_f1": 0.74, "intervals": {"macro_f1": [0.70, 0.78]}}
    assert verdicts(old, new)["macro-F1"] == "lower"
    assert verdicts(new, old)["macro-F1"] == "higher"
    new["candidates"][0]["metrics"] |= {"macro_f1": 0.797}
    assert verdicts(old, new)["macro-F1"] == "no difference"


def test_a_model_without_answers_is_slower(measured: Record) -> None:
    new = changed(measured, spread(0), spread(1))
    new["candidates"][0]["scenarios"][0]["latency_ms"] = dict.fromkeys(("p50", "p99"))
    (throughput,) = (change for change in compare(measured, new).changes if change.scenario)
    assert throughput.verdict == "slower"
    assert throughput.ratio == 0
    (throughput,) = (change for change in compare(new, measured).changes if change.scenario)
    assert (throughput.verdict, throughput.ratio) == ("faster", None)


def test_other_differences_come_first(measured: Record, tmp_path: Path) -> None:
    new = copy.deepcopy(measured)
    new["machine"]["cpu"] = "Another CPU"
    new["machine"]["packages"]["numpy"] = "0.1"
    new["texts"]["rows"] = 5
    new["threads"] = 64
    new["warnings"] = ["other programs used up to 90% of the CPUs"]
    new["candidates"].append({**new["candidates"][0], "name": "newcomer"})
    done = compared(*write(tmp_path, old=measured, new=new))
    assert done.exit_code == 0, done.stderr
    notes, _, figures = done.stdout.partition("\nmodel\n")
    for note in ("-> Another CPU", "numpy: ", "rows: 4 -> 5", "threads: not told -> 64", "only in the new: newcomer",
                 "new: other programs used up to 90%"):  # fmt: skip
        assert note in notes
    assert "4 callers" in figures
    assert "note:" not in figures


def test_json_has_every_figure_with_ratio_and_spread(measured: Record, tmp_path: Path) -> None:
    new = changed(measured, spread(200, 1), spread(1))
    done = compared(*write(tmp_path, old=changed(measured, spread(100, 1), spread(1)), new=new), "--json")
    assert done.exit_code == 0, done.stderr
    printed = json.loads(done.stdout)
    assert printed["differences"] == []
    assert printed["changes"][0] == {
        "part": "", "candidate": "model", "scenario": "4 callers", "figure": "throughput", "unit": "texts/s",
        "old": spread(100, 1), "new": spread(200, 1), "ratio": 2.0, "verdict": "faster",
    }  # fmt: skip


def test_a_suites_workloads_and_servers_are_compared_each_with_its_own(measured: Record, tmp_path: Path) -> None:
    faster = changed(measured, spread(1e9), spread(1))

    def suite(tweets: Record, serving: Record) -> Record:
        return {
            "schema": 1, "started": "now", "threads": 2, "machine": measured["machine"],
            "workloads": [{"key": "tweets", "bench": tweets}], "serving": serving,
        }  # fmt: skip

    old, new = write(tmp_path, old=suite(measured, measured), new=suite(measured, faster))
    changes = compare(read_record(Path(old)), read_record(Path(new))).changes
    assert {c.part: c.verdict for c in changes if c.figure == "throughput"} == {
        "tweets": "no difference", "serving": "faster"
    }  # fmt: skip
    assert "serving: model" in compared(old, new).stdout


def test_recorded_results_of_the_suite_are_read() -> None:
    (path,) = sorted((ROOT / "bench" / "results").glob("*-translation.json"))[-1:]
    done = compared(path, path)
    assert done.exit_code == 0, done.stderr
    assert "faster" not in done.stdout
    names = {candidate["name"] for work in results_of(read_record(path)).values() for candidate in work["candidates"]}
    assert len(names) > 3
    assert [name for name in names if f": {name}\n" not in done.stdout] == []


def test_nothing_in_common_is_an_error(measured: Record, tmp_path: Path) -> None:
    other = copy.deepcopy(measured)
    other["candidates"][0]["name"] = "another"
    done = compared(*write(tmp_path, old=measured, new=other))
    assert done.exit_code == 1
    assert "the old one has model, the new another" in done.stderr


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (None, "No such file"),
        (b"\xff\xfe", "not JSON"),
        (b'{"schema": 1', "not JSON"),
        (b"[1, 2]", "not a bench record"),
        (b'{"schema": 1, "machine": {}, "workloads": []}', "not a bench record"),
        (b'{"schema": 1, "machine": {}, "workloads": [3]}', "not a bench record"),
        (b'{"schema": 7, "candidates": []}', "schema 7"),
        (b'{"schema": 1, "machine": {}, "candidates": [{}], "settings": {"rounds": 3}}', "not a bench record"),
    ],
)
def test_a_file_that_is_no_record_is_named(measured: Record, tmp_path: Path, content: bytes | None, what: str) -> None:
    (good,) = write(tmp_path, good=measured)
    bad = tmp_path / "bad.json"
    if content is not None:
        bad.write_bytes(content)
    for words in ((good, bad), (bad, good)):
        done = compared(*words)
        assert done.exit_code == 1
        assert f"{bad}: " in done.stderr
        assert what in done.stderr
        assert "remedy" in done.stderr


def test_compare_refuses_other_arguments(measured: Record, tmp_path: Path) -> None:
    files = write(tmp_path, old=measured, new=measured)
    for words, what in (
        (["--request-rate", 3], "--request-rate"),
        (["exports/a"], "exports/a"),
        (["--data", "x"], "--data"),
    ):
        done = typed("--compare", *files, *words)
        assert done.exit_code == 2
        assert what in done.stderr
    assert typed("--compare", files[0]).exit_code == 2


def test_without_models_or_texts_there_is_nothing_to_measure() -> None:
    for words, what in (([], "TARGETS"), (["exports/a"], "--data")):
        done = typed(*words)
        assert done.exit_code == 2
        assert f"{what} is missing" in done.stderr
