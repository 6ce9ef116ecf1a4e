"""SmoothQuant keeps the graph's function, and makes INT8 robust against outliers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import numpy_helper

from deploykit.quantization.encoder import TokenRows, calibrate_encoder
from deploykit.quantization.qdq import Scheme, linear_layers, quantize
from deploykit.quantization.smooth_quant import Scales, smooth, smoothed, smoothing_scales
from deploykit.runtime.engines.onnxruntime import session_options

OUTLIERS = [3, 17]
CALIBRATION = 64


@dataclass(frozen=True)
class Case:
    """A random classifier in which some channels of the norms' outputs are 60 times as large as the others."""

    graph: Path
    token_ids: list[list[int]]
    logits: np.ndarray
    norms_first: bool

    @property
    def model(self) -> onnx.ModelProto:
        return onnx.load(self.graph)

    def scales(self, alpha: float = 0.5) -> Scales:
        return smoothing_scales(self.graph, self.token_ids[:CALIBRATION], alpha)

    def agreement(self, graph: Path, scheme: Scheme) -> float:
        """Return the share of texts with the same answer in INT8 as in fp32, which gives each class half of them."""
        calibration = calibrate_encoder(graph, TokenRows(self.token_ids[:CALIBRATION], "rows"))
        quantized, count = quantize(onnx.load(graph), calibration.ranges("minmax"), scheme)
        assert count.linear_layers == 12
        margins, expected = (x[:, 1] - x[:, 0] for x in (run(quantized, self.token_ids), self.logits))
        boundary = np.median(expected)
        return float(((margins > boundary) == (expected > boundary)).mean())


def run(model: onnx.ModelProto, token_ids: Sequence[Sequence[int]]) -> np.ndarray:
    session = ort.InferenceSession(model.SerializeToString(), session_options(1), providers=["CPUExecutionProvider"])
    rows = [np.array([ids]) for ids in token_ids]
    return np.concatenate(
        [session.run(None, {"input_ids": ids, "attention_mask": np.ones_like(ids)})[0] for ids in rows]
    )


@pytest.fixture(scope="module", params=["roberta-prelayernorm", "bert"])
def case(
    request: pytest.FixtureRequest, make_tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Case:
    import torch

    from deploykit.graphs.onnx_export import export_classifier
    from deploykit.training.checkpoint import load_model

    folder = tmp_path_factory.mktemp("smooth")
    model = load_model(str(make_tiny_checkpoint(folder / "checkpoint", request.param)))
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.LayerNorm):
                module.weight[OUTLIERS] *= 60
            if name.endswith(("query", "key", "value", "intermediate.dense")):
                module.weight[:, OUTLIERS] /= 60
    export_classifier(model, folder / "model.onnx")
    random = np.random.default_rng(0)
    token_ids = [[2, *random.integers(4, 204, random.integers(3, 28)).tolist(), 3] for _ in range(300)]
    return Case(
        folder / "model.onnx", token_ids, run(onnx.load(folder / "model.onnx"), token_ids), request.param != "bert"
    )


def test_a_smoothed_graph_computes_the_same(case: Case) -> None:
    model, count = smooth(case.model, case.scales())
    difference = np.abs(run(model, case.token_ids) - case.logits).max()
    assert difference < 1e-5 * np.abs(case.logits).max()
    multiplied = [node.name for node in model.graph.node if node.op_type == "Mul" and node.name.endswith("/smoothed")]
    if case.norms_first:
        assert (count.folded, count.multiplied, multiplied) == (4, 0, [])
    else:  # norms after each block are read by residual connections too
        assert (count.folded, count.multiplied, len(multiplied)) == (0, 4, 4)


def test_the_scales_are_those_of_the_paper(case: Case) -> None:
    weights = {i.name: numpy_helper.to_array(i) for i in case.model.graph.initializer}
    layers = linear_layers(case.model)
    scales = case.scales(0.7)
    assert len(scales) == 4
    for name, scale in scales.items():
        own = [weights[layer.weight] for layer in layers if layer.activation == name]
        assert len(own) in (1, 3), "queries, keys and values read one activation"
        shown = with_output(case.model, name)
        session = ort.InferenceSession(
            shown.SerializeToString(), session_options(1), providers=["CPUExecutionProvider"]
        )
        highest = np.zeros(len(scale), np.float32)
        for ids in case.token_ids[:CALIBRATION]:
            feeds = {"input_ids": np.array([ids]), "attention_mask": np.ones((1, len(ids)), np.int64)}
            highest = np.maximum(highest, np.abs(session.run([name], feeds)[0]).max(axis=(0, 1)))
        expected = highest**0.7 / np.max([np.abs(w).max(axis=1) for w in own], axis=0) ** 0.3
        np.testing.assert_allclose(scale, expected, rtol=1e-4)


def with_output(model: onnx.ModelProto, name: str) -> onnx.ModelProto:
    model.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    return model


@pytest.mark.parametrize("scheme", ["s8s8", "u8s8"])
def test_smoothing_restores_answers_that_outliers_cost_int8(case: Case, scheme: Scheme, tmp_path: Path) -> None:
    onnx.save(smooth(case.model, case.scales())[0], tmp_path / "smoothed.onnx")
    plain, smoothed_ = case.agreement(case.graph, scheme), case.agreement(tmp_path / "smoothed.onnx", scheme)
    assert plain < 0.9
    assert smoothed_ > 0.95
    assert smoothed_ > plain + 0.08


def test_channels_that_are_always_0_stay_as_they_are(case: Case, tmp_path: Path) -> None:
    model = case.model
    norm = next(node for node in model.graph.node if node.op_type == "LayerNormalization")
    for tensor in model.graph.initializer:
        if tensor.name in norm.input[1:]:
            values = numpy_helper.to_array(tensor).copy()
            values[5] = 0
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    onnx.save(model, tmp_path / "zero.onnx")
    scales = smoothing_scales(tmp_path / "zero.onnx", case.token_ids[:8], 0.5)
    zero = [scale[5] for name, scale in scales.items() if name == norm.output[0]]
    assert all(scale == 1 for scale in zero)
    assert all(np.isfinite(scale).all() and (scale > 0).all() for scale in scales.values())


def test_smoothing_without_scales_changes_nothing(case: Case) -> None:
    model, count = smooth(case.model, {})
    assert (count.folded, count.multiplied) == (0, 0)
    assert [node.output[0] for node in model.graph.node] == [node.output[0] for node in case.model.graph.node]


def test_smoothed_activations_have_names_of_their_own(case: Case) -> None:
    scales = case.scales()
    model, _ = smooth(case.model, scales)
    read = {layer.activation for layer in linear_layers(model)}
    assert {smoothed(name) for name in scales} <= read
    assert not set(scales) & read


def test_a_norm_without_constant_parameters_gets_a_mul(case: Case) -> None:
    """Equal parameters of fp16 graphs are stored once."""
    model, scales = case.model, case.scales()
    norm = next(node for node in model.graph.node if node.output[0] in scales)
    model.graph.node.insert(0, onnx.helper.make_node("Identity", [norm.input[1]], ["shared"]))
    norm.input[1] = "shared"
    changed, count = smooth(model, scales)
    assert (count.folded, count.multiplied) == ((3, 1) if case.norms_first else (0, 4))
    assert np.abs(run(changed, case.token_ids) - case.logits).max() < 1e-5 * np.abs(case.logits).max()
