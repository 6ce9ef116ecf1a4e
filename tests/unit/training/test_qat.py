"""Quantization-aware training: rounding, gradients, and equality of training and export."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

from deploykit.errors import ArtifactError, ExportError
from deploykit.graphs.onnx_export import export_classifier
from deploykit.quantization.qdq import Scheme, activation_parameters, quantize, quantize_weight
from deploykit.runtime.engines.onnxruntime import session_options
from deploykit.training.checkpoint import load_model
from deploykit.training.qat import FakeQuantization, TrainedScales, fake_quantize
from deploykit.training.trained_ranges import trained_ranges

LAYER = "bert.encoder.layer.0"


def token_ids(count: int, seed: int = 0) -> list[list[int]]:
    random = np.random.default_rng(seed)
    return [[2, *random.integers(4, 204, random.integers(3, 28)).tolist(), 3] for _ in range(count)]


@pytest.fixture
def model(make_tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> Any:
    return load_model(str(make_tiny_checkpoint(tmp_path / "checkpoint")))


def logits(model: Any, ids: list[int]) -> np.ndarray:
    with torch.no_grad():
        return np.asarray(model(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids))).logits)


def test_rounding_is_that_of_quantize_linear() -> None:
    x = torch.linspace(-3, 3, 1001)
    scale = torch.tensor(0.02)
    expected = np.clip(np.rint(x.numpy() / np.float32(0.02)), -128, 127) * np.float32(0.02)
    np.testing.assert_array_equal(fake_quantize(x, scale, -128).numpy(), expected)


def test_gradients_pass_where_values_are_in_range_and_scales_get_those_of_lsq() -> None:
    x = torch.tensor([0.24, -0.31, 9.0, -9.0], requires_grad=True)
    scale = torch.tensor(0.05, requires_grad=True)
    fake_quantize(x, scale, -128).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [1, 1, 0, 0]
    assert scale.grad is not None
    # (round(v) - v) within the range, where v = x / scale, and the lowest or highest step beyond it
    assert float(scale.grad) == pytest.approx((5 - 4.8) + (-6 + 6.2) + 127 - 128, abs=1e-4)


def test_inputs_of_linear_layers_over_tokens_are_rounded_and_those_that_share_one_share_its_scale(model: Any) -> None:
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    scales = FakeQuantization(model, token_ids(20), "minmax").remove().scales
    assert len(scales) == 12
    assert not any("pooler" in name or "classifier" in name for name in scales)
    assert scales[f"{LAYER}.attention.self.query"] == scales[f"{LAYER}.attention.self.value"]
    assert scales[f"{LAYER}.attention.self.query"] != scales[f"{LAYER}.output.dense"]
    assert model.state_dict().keys() == weights.keys(), "as it came"
    assert not [name for name, module in model.named_modules() if "forward" in vars(module)]


def test_scales_begin_as_calibrated_and_are_learned(model: Any) -> None:
    ids = token_ids(20)
    layer = model.get_submodule(f"{LAYER}.intermediate.dense")
    seen: list[float] = []
    hook = layer.register_forward_pre_hook(lambda _, args: seen.append(float(args[0].abs().max())))
    for row in ids:
        logits(model, row)
    hook.remove()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    rounded = FakeQuantization(model, ids, "minmax")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    start = {name: float(rounded_scale) for name, rounded_scale in zip(range(8), model.input_scales.initial)}
    assert max(seen) / 127 == pytest.approx(min(start.values(), key=lambda s: abs(s - max(seen) / 127)), rel=1e-5)
    for row in ids[:4]:
        optimizer.zero_grad()
        model(torch.tensor([row]), labels=torch.tensor([1])).loss.backward()
        optimizer.step()
    trained = rounded.remove()
    assert all(abs(a / b - 1) > 0.01 for a, b in zip(dict.fromkeys(trained.scales.values()), start.values()))
    changed = [n for n, p in model.named_parameters() if n.endswith("weight") and not torch.equal(p, before[n])]
    assert f"{LAYER}.attention.self.query.weight" in changed


@pytest.mark.parametrize("scheme", ["s8s8", "u8s8"])
def test_an_export_computes_what_was_trained(model: Any, tmp_path: Path, scheme: Scheme) -> None:
    ids = token_ids(60)
    rounded = FakeQuantization(model, ids[:20], "percentile")
    with torch.no_grad():  # values that training may produce
        model.input_scales.shift += torch.linspace(-0.002, 0.002, 8)
    expected = np.concatenate([logits(model, row) for row in ids])
    trained = rounded.remove()
    unrounded = np.concatenate([logits(model, row) for row in ids])
    export_classifier(model, tmp_path / "model.onnx")
    graph = onnx.load(tmp_path / "model.onnx")
    ranges = trained_ranges(trained, model, graph, _activations(graph))
    assert len(ranges) == 8
    quantized, count = quantize(graph, ranges, scheme)
    assert count.linear_layers == 12
    session = ort.InferenceSession(
        quantized.SerializeToString(), session_options(1), providers=["CPUExecutionProvider"]
    )
    actual = np.concatenate(
        [
            session.run(None, {"input_ids": np.array([r]), "attention_mask": np.ones((1, len(r)), np.int64)})[0]
            for r in ids
        ]
    )
    # Scales are equal, but products are summed in another order: in few texts a value at the boundary of two steps may
    # be rounded to the other one, with little effect.
    difference = np.abs(actual - expected).max(axis=1)
    assert np.quantile(difference, 0.9) < 1e-5
    assert difference.max() < 0.5 * np.abs(expected - unrounded).max()


def _activations(graph: onnx.ModelProto) -> set[str]:
    from deploykit.quantization.qdq import linear_layers

    return {layer.activation for layer in linear_layers(graph) if "encoder" in layer.node}


def test_trained_scales_give_the_same_steps_in_both_schemes() -> None:
    scale = 0.0123
    (s8, zero), (u8, middle) = (activation_parameters(-127 * scale, 127 * scale, s) for s in ("s8s8", "u8s8"))  # type: ignore[arg-type]
    assert (zero, middle) == (0, 128)
    assert s8 == u8 == np.float32(scale)


def test_embeddings_that_the_export_rounds_are_rounded(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from deploykit.training import qat

    monkeypatch.setattr(qat, "MIN_EMBEDDING_ROWS", 200)
    table = model.bert.embeddings.word_embeddings
    rounded = FakeQuantization(model, token_ids(4), "minmax")
    rows = table(torch.arange(204)).detach().numpy()
    values, scales = quantize_weight(table.weight.detach().numpy(), axis=0)
    np.testing.assert_array_equal(rows, values.astype(np.float32) * scales[:, None])
    rounded.remove()
    np.testing.assert_array_equal(table(torch.arange(204)).detach().numpy(), table.weight.detach().numpy())


@pytest.fixture
def exported(model: Any, tmp_path: Path) -> tuple[TrainedScales, Any, onnx.ModelProto]:
    trained = FakeQuantization(model, token_ids(4), "minmax").remove()
    export_classifier(model, tmp_path / "model.onnx")
    return trained, model, onnx.load(tmp_path / "model.onnx")


def test_a_quantized_layer_without_a_trained_range_is_an_error(exported: tuple[TrainedScales, Any, Any]) -> None:
    trained, model, graph = exported
    some = {name: scale for name, scale in trained.scales.items() if not name.endswith("0.output.dense")}
    with pytest.raises(ExportError, match=r"no scale for the input of .*layer\.0/output/dense") as error:
        trained_ranges(dataclasses.replace(trained, scales=some), model, graph, _activations(graph))
    assert "finetune --qat" in str(error.value.remedy)


def test_scales_of_layers_that_are_not_there_or_not_quantized_are_errors(
    exported: tuple[TrainedScales, Any, Any],
) -> None:
    trained, model, graph = exported
    renamed = {**trained.scales, "bert.nothing": 0.1}
    with pytest.raises(ExportError, match=r"no linear layer bert\.nothing"):
        trained_ranges(dataclasses.replace(trained, scales=renamed), model, graph, _activations(graph))
    more = {**trained.scales, "bert.pooler.dense": 0.1}
    with pytest.raises(ExportError, match=r"bert\.pooler\.dense has a scale"):
        trained_ranges(dataclasses.replace(trained, scales=more), model, graph, _activations(graph))


def test_layers_of_one_input_with_different_scales_are_an_error(exported: tuple[TrainedScales, Any, Any]) -> None:
    trained, model, graph = exported
    apart = {**trained.scales, f"{LAYER}.attention.self.key": 9.0}
    with pytest.raises(ExportError, match=r"different scales"):
        trained_ranges(dataclasses.replace(trained, scales=apart), model, graph, _activations(graph))


def test_weights_that_changed_after_training_are_an_error(exported: tuple[TrainedScales, Any, Any]) -> None:
    trained, model, graph = exported
    with torch.no_grad():
        model.get_submodule(f"{LAYER}.output.dense").weight += 1
    with pytest.raises(ExportError, match=r"no scale for the input of .*layer\.0/output/dense"):
        trained_ranges(trained, model, graph, _activations(graph))


def test_scales_are_read_back_as_written(tmp_path: Path) -> None:
    assert TrainedScales.load(tmp_path) is None
    trained = TrainedScales({"a.b": 0.1, "c": float(np.float32(1 / 3))}, "mse", 7)
    trained.save(tmp_path)
    assert TrainedScales.load(tmp_path) == trained


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"scales": {"a": 0}, "method": "mse", "rows": 1}',
        '{"scales": {"a": "x"}, "method": "", "rows": 1}',
    ],
)
def test_a_damaged_file_of_scales_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "qat.json").write_text(content)
    with pytest.raises(ArtifactError, match=r"qat\.json"):
        TrainedScales.load(tmp_path)


def test_a_model_without_linear_layers_of_pytorch_is_refused() -> None:
    from transformers import GPT2Config, GPT2ForSequenceClassification

    config = GPT2Config(vocab_size=204, n_positions=40, n_embd=16, n_layer=1, n_head=2, pad_token_id=0)
    with pytest.raises(ExportError, match="Conv1D"):
        FakeQuantization(GPT2ForSequenceClassification(config).eval(), token_ids(2), "minmax")
