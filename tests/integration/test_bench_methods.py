"""bench/methods.py from end to end, on a model so small that it takes seconds."""

from __future__ import annotations

import importlib
import json
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from paths import ROOT

from deploykit.runtime.engines import ENGINES


def test_a_model_has_a_line_for_each_form_and_method(
    make_tiny_translation: Callable[..., Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    make_tiny_translation(tmp_path / "export", keep_checkpoint=run)
    pairs = tmp_path / "pairs.tsv"
    lines = ["en\tfr", *(f"Save the file {i}.\tEnregistrez le fichier {i}." for i in range(5))]
    pairs.write_text("\n".join(lines) + "\n", encoding="utf-8")
    words = [run, tmp_path / "nowhere", "--methods", "mse", "--targets", "--data", pairs, "--out", tmp_path / "m.json"]
    subprocess.run([sys.executable, ROOT / "bench" / "methods.py", *words], check=True)
    result = json.loads((tmp_path / "m.json").read_text(encoding="utf-8"))
    assert list(result["skipped"]) == [str(tmp_path / "nowhere")]
    (workload,) = result["workloads"]
    assert (workload["key"], workload["rows"], workload["calibration"]["rows"]) == ("run", 5, 5)
    assert workload["calibration"]["peak_memory_mb"] > 50
    forms = [(line["precision"], line["engine"], line["method"]) for line in workload["lines"]]
    engines = ["onnxruntime", *(["native"] if ENGINES["native"].installed else [])]
    of_int8 = [("int8", engine, "mse") for engine in engines]
    assert forms == [("fp32", "pytorch", None), ("fp32", "onnxruntime", None), *of_int8]
    table = runpy.run_path(str(ROOT / "bench" / "table.py"))["render_methods"](result).splitlines()
    assert table[4] == "| | method | BLEU | chrF | agreement | INT8 layers | INT8 products of the engine |"
    assert table[-1].startswith(f"| int8, {engines[-1]} | mse |")


def test_lines_for_tensorrt_have_the_counts_of_the_logs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    lines_of = importlib.import_module("methods").lines_of
    exported = {
        "accuracy": [
            {"precision": "trt int8", "engine": "onnxruntime", "macro_f1": 0.5},
            {"precision": "trt fp16", "engine": "onnxruntime", "macro_f1": 0.6},
        ],
        "engines": [
            {"precision": "fp16", "int8_gemms": 0},
            {"precision": "int8", "int8_gemms": 20},
            {"precision": "int8", "int8_gemms": 4},
        ],
    }
    found = [(x["precision"], x["method"], x["target"], x["int8_gemms"]) for x in lines_of(exported, "mse", "sm_86")]
    assert found == [("trt int8", "mse", "sm_86", 24), ("trt fp16", None, "sm_86", 0)]
