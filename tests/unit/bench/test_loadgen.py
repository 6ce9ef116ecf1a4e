"""bench/loadgen.py: MLPerf LoadGen queries an export, and its figures are parsed."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from paths import ROOT

from deploykit.errors import DeploykitError

SUMMARY = "Samples per second: 1.5e+02\nResult is : VALID\n50.00 percentile latency (ns)   : 13160000\n"


@pytest.fixture
def loadgen(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    return importlib.import_module("loadgen")


def test_figures_are_read_from_the_summary(loadgen: Any) -> None:
    assert loadgen.read_summary(SUMMARY, "Samples per second") == 150
    assert loadgen.read_summary(SUMMARY, "50.00 percentile latency (ns)") == 13_160_000
    with pytest.raises(DeploykitError, match="no line '99"):
        loadgen.read_summary(SUMMARY, "99.00 percentile latency (ns)")


def test_both_generators_ask_all_texts(tiny_export: Path, tmp_path: Path) -> None:
    pytest.importorskip("mlperf_loadgen")
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"text": f"w{i} w{i + 1}"}) for i in range(20)))
    words = [tiny_export, "--data", tmp_path / "rows.jsonl", "--seconds", 0.1, "--threads", 1]
    done = subprocess.run(
        [sys.executable, str(ROOT / "bench" / "loadgen.py"), *map(str, words)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    head, *lines = done.stdout.splitlines()
    assert head.split() == ["LoadGen", "ours"]
    assert [line.rsplit(maxsplit=2)[0] for line in lines] == [
        "SingleStream p50 ms",
        "SingleStream p99 ms",
        "Offline texts/s",
    ]
    assert all(float(figure) > 0 for line in lines for figure in line.rsplit(maxsplit=2)[1:])
