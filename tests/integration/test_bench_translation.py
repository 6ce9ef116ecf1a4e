"""bench/translation.py from end to end, on models so small that it takes seconds."""

from __future__ import annotations

import importlib
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from html_page import Page
from paths import ROOT

from deploykit.runtime.engines import ENGINES, NATIVE_FILE

NAMES = ["Hugging Face fp32", "CTranslate2 float32", "CTranslate2 int8", "deploykit onnxruntime fp32",
         "deploykit onnxruntime int8", *(["deploykit native int8"] if ENGINES["native"].installed else [])]  # fmt: skip


@pytest.fixture(scope="module")
def suite(make_tiny_translation: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The result of a quick run on both subjects; its folder also has the page."""
    folder = tmp_path_factory.mktemp("suite")
    checkpoint = folder / "checkpoint"
    export = make_tiny_translation(folder / "export", keep_checkpoint=checkpoint)
    _add_int8(export, make_tiny_translation(folder / "int8", precision="int8"))
    pairs = folder / "pairs.tsv"
    lines = ["en\tfr", *(f"Save the file {i}.\tEnregistrez le fichier {i}." for i in range(5))]
    pairs.write_text("\n".join(lines) + "\n", encoding="utf-8")
    words = ["--quick", "--parts", "shape", "example", "--threads", "1", "--checkpoint", checkpoint,
             "--export", export, "--data", pairs, "--out", folder / "suite.json"]  # fmt: skip
    subprocess.run(
        [sys.executable, str(ROOT / "bench" / "translation.py"), *map(str, words)],
        check=True,
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    result: dict[str, Any] = json.loads((folder / "suite.json").read_text(encoding="utf-8"))
    result["page"] = (folder / "suite.html").read_text(encoding="utf-8")
    return result


def _add_int8(export: Path, other: Path) -> None:
    """Merge two exports into one with both precisions, like ``deploykit export --int8``."""
    from deploykit.artifacts import MANIFEST, load_manifest, write_manifest

    task = load_manifest(export).task
    for file in (*other.glob("*.u8s8.*"), other / NATIVE_FILE):
        file.rename(export / file.name)
    (export / MANIFEST).unlink()
    write_manifest(export, "export", task, inputs="both")


def test_all_contenders_are_measured_on_both_subjects(suite: dict[str, Any]) -> None:
    pytest.importorskip("ctranslate2")
    assert [name for name in suite["skipped"] if not name.startswith("deploykit native")] == []
    assert [w["key"] for w in suite["workloads"]] == [
        "shape-greedy",
        "shape-beam-4",
        "example-greedy",
        "example-beam-4",
    ]
    for workload in suite["workloads"]:
        candidates = workload["bench"]["candidates"]
        assert [c["name"] for c in candidates] == NAMES
        assert all(s["errors"] == 0 for c in candidates for s in c["scenarios"])
        assert all(c["size_mb"] > 0 for c in candidates)
        assert all(c["first_answer_s"] > 0 for c in candidates)
        assert all(c["peak_memory_mb"] > 10 for c in candidates)
        assert set(workload["tuned"]) == {"CTranslate2 float32", "CTranslate2 int8"}
        shares = [share for shares in workload["projection"].values() for share in shares.values()]
        assert len(shares) >= 2
        assert all(0 < share < 1 for share in shares)


def test_the_peers_run_the_same_model(suite: dict[str, Any]) -> None:
    pytest.importorskip("ctranslate2")
    for workload in suite["workloads"]:
        if workload["beam_size"] == 1:
            assert workload["agreement"]["Hugging Face fp32"] == 1.0
            assert workload["agreement"]["CTranslate2 float32"] == 1.0
            assert workload["agreement"]["deploykit onnxruntime fp32"] == 1.0


def test_the_random_shape_generates_the_given_number_of_tokens(suite: dict[str, Any]) -> None:
    for workload in suite["workloads"][:2]:
        for candidate in workload["bench"]["candidates"]:
            for s in candidate["scenarios"]:
                assert s["tokens_per_s"]["median"] == pytest.approx(32 * s["throughput_per_s"]["median"])
        assert workload["bench"]["metrics"] is None


def test_the_example_is_graded_and_translated_in_one_call(suite: dict[str, Any]) -> None:
    for workload in suite["workloads"][2:]:
        assert all(c["metrics"]["chrf"] >= 0 for c in workload["bench"]["candidates"])
        assert workload["bench"]["candidates"][0]["scenarios"][-1]["scenario"]["concurrency"] == 5


def test_the_page_has_every_workload_and_no_id_twice(suite: dict[str, Any]) -> None:
    page = Page(suite["page"])
    assert [name for name, count in page.ids.items() if count > 1] == []
    assert all(reference[1:] in page.ids for reference in page.references)
    for workload in suite["workloads"]:
        assert workload["key"] in page.text


def test_the_readmes_table_is_rendered_from_the_suite(suite: dict[str, Any]) -> None:
    table = runpy.run_path(str(ROOT / "bench" / "table.py"))["render_translation"]
    lines = table(suite).splitlines()
    assert sum(line.startswith("| deploykit onnxruntime int8 |") for line in lines) == 4
    (head,) = {line for line in lines if "| BLEU | chrF | 2 | all |" in line}
    peers = [line for line in lines if line.startswith("| CTranslate2 int8 |")]
    assert all("| 1.00 |" in line for line in peers)
    assert all(line.count("|") == head.count("|") for line in lines[-5:])
    assert "served" not in "\n".join(lines).lower()


def test_a_peer_that_runs_another_model_is_void(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    void = importlib.import_module("translation").void
    assert void({"CTranslate2 float32": 0.95, "CTranslate2 int8": 0.1}) is None
    assert void({"Hugging Face fp32": 1.0}) is None
    assert (
        void({"CTranslate2 float32": 0.5}) == "void: its float32 translates 50% of the texts as deploykit's fp32 does"
    )


def test_every_sensible_batching_of_ctranslate2_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ctranslate2")
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    contenders = importlib.import_module("translation_contenders")

    def ways(threads: int, sentences: int) -> list[tuple[int, int, str]]:
        peer = object.__new__(contenders.CTranslate2)
        peer._threads = threads
        return [(way.workers, way.max_batch_size, way.batch_type) for way in peer._ways(sentences)]

    assert ways(2, 1) == [(1, 0, "examples"), (2, 0, "examples")]
    assert {size for workers, size, _ in ways(2, 8) if workers == 2} == {0, 4}
    assert {(size, kind) for workers, size, kind in ways(2, 64) if workers == 1} == {
        (0, "examples"), (16, "examples"), (32, "examples"), (1024, "tokens")
    }  # fmt: skip


def test_without_the_example_the_rest_is_measured(tmp_path: Path) -> None:
    words = ["--quick", "--parts", "example", "--export", str(tmp_path / "nowhere"), "--out", str(tmp_path / "s.json")]
    subprocess.run([sys.executable, str(ROOT / "bench" / "translation.py"), *words], check=True)
    result = json.loads((tmp_path / "s.json").read_text(encoding="utf-8"))
    assert "nowhere" in result["skipped"]["trained example"]
    assert result["workloads"] == []
