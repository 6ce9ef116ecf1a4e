"""bench/classification.py from end to end: a peer beside deploykit, on a real MiniLM, in one short round."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from paths import ROOT

from deploykit.runtime.engines.native.loader import lacks

NAMES = ["PyTorch fp32", "deploykit openvino int8", *(["deploykit native int8"] if lacks() is None else [])]


@pytest.fixture(scope="module")
def suite(checkpoint: Path, exported: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("suite")
    words = ["--quick", "--parts", "tweets", "--tweets", checkpoint, exported, "--contenders", *NAMES,
             "--max-rows", 40, "--rounds", 1, "--seconds", 0.2, "--out", folder / "suite.json"]  # fmt: skip
    subprocess.run(
        [sys.executable, str(ROOT / "bench" / "classification.py"), *map(str, words)], check=True, cwd=folder
    )
    result: dict[str, Any] = json.loads((folder / "suite.json").read_text(encoding="utf-8"))
    result["path"] = folder / "suite.json"
    result["page"] = (folder / "suite.html").read_text(encoding="utf-8")
    return result


@pytest.mark.slow
def test_all_run_the_same_model(suite: dict[str, Any]) -> None:
    at_once, offline = (workload["bench"] for workload in suite["workloads"])
    assert [c["name"] for c in at_once["candidates"]] == [*NAMES, "deploykit, served"]
    assert [c["name"] for c in offline["candidates"]] == NAMES
    for candidate in at_once["candidates"] + offline["candidates"]:
        assert all(s["errors"] == 0 for s in candidate["scenarios"])
        fp32 = at_once["candidates"][0]["metrics"]
        assert candidate["metrics"]["accuracy"] == pytest.approx(fp32["accuracy"], abs=0.1)
        if candidate["name"] in NAMES:
            assert candidate["size_mb"] > 10
            assert candidate["first_answer_s"] > 0
            assert candidate["peak_memory_mb"] > 50
    assert offline["candidates"][0]["scenarios"][0]["scenario"]["concurrency"] == 40


@pytest.mark.slow
def test_page_and_readme_table_are_rendered_from_the_suite(suite: dict[str, Any]) -> None:
    table = runpy.run_path(str(ROOT / "bench" / "table.py"))["render_classification"](suite)
    for name in [*NAMES, "deploykit, served"]:
        assert name in suite["page"]
        assert f"| {name} |" in table


@pytest.mark.slow
def test_a_part_measured_again_keeps_the_others(suite: dict[str, Any], tmp_path: Path) -> None:
    words = ["--quick", "--add", "--parts", "articles", "--articles", tmp_path / "none", tmp_path / "none",
             "--out", suite["path"]]  # fmt: skip
    subprocess.run([sys.executable, str(ROOT / "bench" / "classification.py"), *map(str, words)], check=True)
    result = json.loads(suite["path"].read_text(encoding="utf-8"))
    assert result["workloads"] == suite["workloads"]
    assert result["earlier"] == [{key: suite[key] for key in ("started", "command")}]
    assert "articles" in result["skipped"]
