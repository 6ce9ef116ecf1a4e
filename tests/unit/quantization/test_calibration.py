from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from deploykit.artifacts import write_manifest
from deploykit.errors import ArtifactError, ExportError
from deploykit.quantization.calibration import BINS, METHODS, Calibration, Histogram, clipped_range, load_calibration
from deploykit.quantization.encoder import TokenRows, calibrate_encoder
from deploykit.quantization.qdq import activation_parameters, linear_layers, quantize, quantize_weight
from deploykit.runtime.engines.onnxruntime import session_options
from deploykit.tasks.classification.facts import Classification


def histogram_of(values: np.ndarray) -> Histogram:
    low, high = float(values.min()), float(values.max())
    return Histogram(low, high, np.histogram(values, bins=BINS, range=(low, high))[0])


@pytest.fixture
def long_tailed() -> np.ndarray:
    rng = np.random.default_rng(0)
    return np.concatenate([rng.normal(0, 1, 200_000), rng.normal(0, 1, 20) * 30])


def test_minmax_keeps_the_exact_extremes(long_tailed: np.ndarray) -> None:
    assert clipped_range(histogram_of(long_tailed), "minmax") == (long_tailed.min(), long_tailed.max())


def test_percentile_agrees_with_numpy(long_tailed: np.ndarray) -> None:
    low, high = clipped_range(histogram_of(long_tailed), "percentile")
    width = np.abs(long_tailed).max() / BINS
    assert high == pytest.approx(np.percentile(np.abs(long_tailed), 99.99), abs=2 * width)
    assert low == -high


def test_mse_finds_the_threshold_that_a_search_over_the_values_finds(long_tailed: np.ndarray) -> None:
    def error(threshold: float) -> float:
        scale = threshold / 127
        return float(((long_tailed - np.clip(np.rint(long_tailed / scale), -127, 127) * scale) ** 2).sum())

    candidates = np.linspace(1, np.abs(long_tailed).max(), 400)
    best = min(map(error, candidates))
    assert error(clipped_range(histogram_of(long_tailed), "mse")[1]) <= 1.05 * best


def test_entropy_clips_a_long_tail_and_keeps_a_uniform_range(long_tailed: np.ndarray) -> None:
    _, high = clipped_range(histogram_of(long_tailed), "entropy")
    assert 3 < high < 0.5 * np.abs(long_tailed).max()
    uniform = np.random.default_rng(1).uniform(-1, 1, 500_000)
    assert clipped_range(histogram_of(uniform), "entropy")[1] > 0.9


def test_the_methods_differ_from_one_another(long_tailed: np.ndarray) -> None:
    histogram = histogram_of(long_tailed)
    assert len({round(clipped_range(histogram, m)[1], 3) for m in METHODS}) == len(METHODS)


def tiny_graph(path: Path, *, gemm: bool = False) -> np.ndarray:
    """input_ids -> embedding -> linear -> logits of the first token."""
    rng = np.random.default_rng(0)
    table = rng.normal(0, 1, (2000, 8)).astype(np.float32)
    weight = rng.normal(0, 1, (8, 5)).astype(np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("Gather", ["table", "input_ids"], ["embedded"]),
            helper.make_node("MatMul", ["embedded", "weight"], ["tokens"], "linear"),
            helper.make_node("Gather", ["tokens", "zero"], ["first"], axis=1),
            helper.make_node("Gemm", ["first", "head", "bias"], ["logits"], "head", transB=1)
            if gemm
            else helper.make_node("MatMul", ["first", "head"], ["logits"], "head"),
        ],
        "tiny",
        [
            helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["b", "s"]),
            helper.make_tensor_value_info("attention_mask", TensorProto.INT64, ["b", "s"]),
        ],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["b", 2])],
        [
            numpy_helper.from_array(table, "table"),
            numpy_helper.from_array(weight, "weight"),
            numpy_helper.from_array(np.array(0), "zero"),
            numpy_helper.from_array(rng.normal(0, 1, (2, 5) if gemm else (5, 2)).astype(np.float32), "head"),
            numpy_helper.from_array(np.array([1, -1], np.float32), "bias"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, path)
    return table


def test_calibration_sees_every_token_and_no_padding(tmp_path: Path) -> None:
    table = tiny_graph(tmp_path / "m.onnx")
    rows = [[1, 2, 3], [4], [5, 6], [7, 8, 9]]
    calibration = calibrate_encoder(tmp_path / "m.onnx", TokenRows(rows, "digest"))
    assert list(calibration.histograms) == ["embedded"], "layers after pooling stay fp32"
    histogram = calibration.histograms["embedded"]
    seen = table[np.concatenate(rows)]
    assert (histogram.low, histogram.high) == (seen.min(), seen.max())
    assert histogram.counts.sum() == seen.size


def save(calibration: Calibration, folder: Path, parent: str) -> Path:
    folder.mkdir()
    calibration.save(folder)
    task = Classification(("a", "b"), max_length=8, pad_token_id=0)
    write_manifest(folder, "calibration", task, inputs="x", parent=parent, metrics=calibration.to_json())
    return folder


def test_a_saved_calibration_gives_the_same_ranges(tmp_path: Path) -> None:
    tiny_graph(tmp_path / "m.onnx")
    calibration = calibrate_encoder(tmp_path / "m.onnx", TokenRows([[1, 2, 3], [4]], "digest"))
    loaded = load_calibration(save(calibration, tmp_path / "c", "mine"), "mine")
    assert loaded.to_json() == calibration.to_json()
    assert loaded.to_json()["rows_digest"] == "digest"
    for method in METHODS:
        assert loaded.ranges(method) == calibration.ranges(method)
    loaded.check(["embedded", "other"])
    with pytest.raises(ArtifactError, match="has the tensor embedded, which is not an input"):
        loaded.check(["other"])


def test_a_calibration_of_another_checkpoint_is_refused(tmp_path: Path) -> None:
    tiny_graph(tmp_path / "m.onnx")
    saved = save(calibrate_encoder(tmp_path / "m.onnx", TokenRows([[1]], "digest")), tmp_path / "c", "theirs")
    with pytest.raises(ArtifactError, match=r"of another checkpoint \(theirs, not mine\)") as refused:
        load_calibration(saved, "mine")
    assert "deploykit calibrate" in (refused.value.remedy or "")


def test_a_graph_without_a_layer_for_int8_is_an_error(tiny_export: Path) -> None:
    with pytest.raises(ExportError, match="no layer can be quantized"):
        calibrate_encoder(tiny_export / "model.onnx", TokenRows([[1, 2, 3]], "digest"))


@pytest.mark.parametrize("scheme", ["s8s8", "u8s8"])
def test_a_quantized_graph_computes_what_numpy_says(tmp_path: Path, scheme: str) -> None:
    table = tiny_graph(tmp_path / "m.onnx")
    model = onnx.load(tmp_path / "m.onnx")
    quantized, count = quantize(model, {"embedded": (-2.0, 3.0)}, scheme)  # type: ignore[arg-type]
    assert (count.linear_layers, count.quantize_nodes, count.dequantize_nodes, count.embeddings) == (1, 1, 2, 1)
    ids = np.array([[3, 1, 4], [15, 9, 2]])
    session = ort.InferenceSession(
        quantized.SerializeToString(), session_options(1), providers=["CPUExecutionProvider"]
    )
    actual = session.run(None, {"input_ids": ids, "attention_mask": np.ones_like(ids)})[0]

    constants = {i.name: numpy_helper.to_array(i) for i in model.graph.initializer}
    rows, row_scales = quantize_weight(table, axis=0)
    embedded = rows.astype(np.float32) * row_scales[:, None]
    scale, zero_point = activation_parameters(-2.0, 3.0, scheme)  # type: ignore[arg-type]
    low, high = (-128, 127) if scheme == "s8s8" else (0, 255)
    steps = np.clip(np.rint(embedded[ids] / scale) + int(zero_point), low, high) - int(zero_point)
    weight, scales = quantize_weight(constants["weight"], axis=1)
    expected = ((steps * scale) @ (weight * scales))[:, 0] @ constants["head"]
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)


def test_a_gemm_is_quantized_with_its_bias(tmp_path: Path) -> None:
    tiny_graph(tmp_path / "m.onnx", gemm=True)
    model = onnx.load(tmp_path / "m.onnx")
    assert [layer.transposed for layer in linear_layers(model)] == [False, True]
    quantized, count = quantize(model, {"embedded": (-4.0, 4.0), "first": (-5.0, 5.0)}, "u8s8")
    assert count.linear_layers == 2
    ids = np.array([[3, 1, 4]])
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    expected, actual = (
        ort.InferenceSession(m.SerializeToString(), session_options(1), providers=["CPUExecutionProvider"]).run(
            None, feeds
        )[0]
        for m in (model, quantized)
    )
    np.testing.assert_allclose(actual, expected, atol=0.3)


def test_symmetric_parameters_have_a_zero_zero_point() -> None:
    assert activation_parameters(-1.0, 3.0, "s8s8")[1] == 0
    scale, zero_point = activation_parameters(-1.0, 3.0, "u8s8")
    assert scale == pytest.approx(4 / 255)
    assert zero_point == 64
