from __future__ import annotations

from deploykit.demo import _summary, table
from deploykit.tasks.demo_recipe import Recipe


def candidate(engine: str | None, precision: str | None, size_mb: float | None, speed: float) -> dict[str, object]:
    scenarios = [
        {
            "scenario": {"concurrency": callers},
            "throughput_per_s": {"median": speed * callers},
            "latency_ms": {key: {"median": callers / speed} for key in ("p50", "p99")},
        }
        for callers in (1, 8)
    ]
    return {
        "engine": engine, "precision": precision, "served": engine is None, "size_mb": size_mb, "peak_memory_mb": 200.0,
        "metrics": {"accuracy": 0.75, "macro_f1": 0.7}, "scenarios": scenarios,
    }  # fmt: skip


def test_a_line_for_each_form_of_the_model() -> None:
    candidates = [
        candidate("torch", "fp32", 91.0, 10.0),
        candidate("openvino", "fp32", 90.0, 20.0),
        candidate("openvino", "int8", 24.0, 50.0),
        candidate(None, None, None, 40.0),
    ]
    lines = table(candidates, {"engine": "openvino", "precision": "int8"})
    assert [(line["name"], line["size_mb"], line["sentences_per_s"]) for line in lines] == [
        ("checkpoint fp32 (torch)", 91.0, 80.0),
        ("ONNX fp32 (openvino)", 90.0, 160.0),
        ("ONNX INT8 (openvino)", 24.0, 400.0),
        ("served INT8 (openvino)", 24.0, 320.0),
    ]
    assert lines[0]["p50_ms"] == 0.1


def test_a_model_that_did_not_exist_before_has_its_own_metrics_alone() -> None:
    """The demo's translator starts from random weights."""
    recipe = Recipe("en-fr", "translation", (), ())
    metrics = {"bleu": 20.0, "chrf": 40.0, "placeholders": {"kept": 3, "checked": 4}}
    assert list(_summary("finetune", {"before": None, "samples": [], "metrics": metrics}, recipe)) == [
        "bleu 20.00, chrf 40.00"
    ]
    (before_and_after,) = _summary("finetune", {"before": metrics, "samples": [], "metrics": metrics}, recipe)
    assert "3 of 4" in before_and_after
