"""The engine ``cuda``. Tests marked ``gpu`` need one; bench/gpu/run.sh runs them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tiny_answerer import squad, write_checkpoint

from deploykit.artifacts import load_manifest
from deploykit.errors import EngineError, MissingDependencyError, UsageError
from deploykit.graphs.export_options import CalibrationOptions
from deploykit.runtime import engines
from deploykit.runtime.engines import load_engine
from deploykit.runtime.engines.onnxruntime_cuda import PROVIDER, OnnxRuntimeCudaEngine
from deploykit.runtime.find_graphs import find_graphs
from deploykit.tasks.opening import open_classifier
from deploykit.tasks.question_answering.checkpoint import TorchAnswerer
from deploykit.tasks.question_answering.export import write_fp32
from deploykit.tasks.question_answering.predictor import load_answerer

TEXTS = ["w1 w2 w3", "w4", "", "unknown words w9 " * 8, "w5 w6 w7 w8"]
needs_gpu = pytest.mark.skipif(engines.ENGINES["cuda"].lacks is not None, reason="needs an NVIDIA GPU")


@pytest.mark.skipif(engines.ENGINES["cuda"].lacks is None, reason="the engine runs here")
def test_a_graph_that_would_run_on_the_cpu_is_refused(tiny_export: Path) -> None:
    with pytest.raises(EngineError, match="cannot load its CUDA provider") as refused:
        OnnxRuntimeCudaEngine(tiny_export / "model.onnx", 1)
    assert "deploykit[gpu]" in str(refused.value.remedy)


def test_an_onnxruntime_without_cuda_and_a_missing_gpu_have_different_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    monkeypatch.setattr(engines, "has_gpu", lambda: True)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    assert engines.ENGINES["cuda"].lacks == f"this ONNX Runtime has no {PROVIDER}"
    monkeypatch.setattr(engines, "has_gpu", lambda: False)
    assert engines.ENGINES["cuda"].lacks == "no GPU"


@pytest.mark.skipif(engines.ENGINES["cuda"].lacks != "no GPU", reason="there is a GPU")
def test_without_a_gpu_the_engine_says_so(tiny_export: Path) -> None:
    with pytest.raises(MissingDependencyError, match="needs an NVIDIA GPU"):
        load_engine("cuda", tiny_export / "model.onnx")


def test_auto_prefers_the_cpus_engines_until_cuda_is_measured() -> None:
    names = list(engines.ENGINES)
    assert names.index("cuda") > names.index("onnxruntime")


def test_translators_are_refused_before_a_gpu_is_looked_for(tiny_translation: Path) -> None:
    with pytest.raises(UsageError, match="cuda does not run translation") as refused:
        find_graphs(tiny_translation, load_manifest(tiny_translation), engine="cuda", precision="auto")
    assert "--engine tensorrt or native or onnxruntime" in str(refused.value.remedy)


@pytest.mark.gpu
@needs_gpu
def test_texts_are_classified_on_the_gpu_as_on_the_cpu(tiny_export: Path) -> None:
    on_gpu = open_classifier(str(tiny_export), url="", engine="cuda")
    on_cpu = open_classifier(str(tiny_export), url="", engine="onnxruntime", precision="fp32")
    np.testing.assert_allclose(on_gpu.scores(TEXTS * 9), on_cpu.scores(TEXTS * 9), atol=1e-5)


@pytest.mark.parametrize("engine", ["onnxruntime", pytest.param("cuda", marks=[pytest.mark.gpu, needs_gpu])])
def test_an_answerer_finds_the_spans_that_pytorch_finds(engine: str, tmp_path: Path) -> None:
    reference = TorchAnswerer.load(write_checkpoint(tmp_path / "base", sharp=True))
    write_fp32(tmp_path / "base", tmp_path, CalibrationOptions())
    answerer = load_answerer(tmp_path, reference.task, load_engine(engine, tmp_path / "model.onnx", 1))
    pairs = [(q["question"], p["context"]) for p in squad(20)["data"][0]["paragraphs"] for q in p["qas"]]
    places = [
        [(found.decide(None).start, found.decide(None).end) for found in a.find(pairs)] for a in (answerer, reference)
    ]
    assert places[0] == places[1]


@pytest.mark.gpu
@needs_gpu
def test_a_gpu_that_is_not_there_is_refused(tiny_export: Path) -> None:
    with pytest.raises(EngineError, match="cannot load it"):
        OnnxRuntimeCudaEngine(tiny_export / "model.onnx", 1, device=99)
