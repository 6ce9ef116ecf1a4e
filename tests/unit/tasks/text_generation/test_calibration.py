"""Calibrated INT8 of language models: ranges of real rows, SmoothQuant, and the graphs that both are written to."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from language_models import random_model, tokenizer

from deploykit.graphs.causal_architecture import CausalArchitecture, read_causal_architecture
from deploykit.graphs.causal_lm import parts_of
from deploykit.graphs.export_options import ExportOptions
from deploykit.quantization.compensated import Rounding
from deploykit.tasks.text_generation.calibration import (
    StaticInt8,
    activations_of,
    calibrate_graph,
    input_factors,
    smoothed,
    static_int8,
)
from deploykit.tasks.text_generation.checkpoint import checkpoint_facts
from deploykit.tasks.text_generation.encode import EncodedRow
from deploykit.tasks.text_generation.grading import quantized_matrices
from deploykit.tasks.text_generation.predictor import load_generator
from deploykit.tasks.text_generation.quantized import quantized_forms, save_graphs, standard_graph

IDS = [np.random.default_rng(i).integers(6, 390, 10 + i % 5).tolist() for i in range(12)]


def logits(model: object, folder: Path, file: str, engine: str = "onnxruntime") -> np.ndarray:
    own = tokenizer()
    own.save_pretrained(folder)
    facts = checkpoint_facts(model.config, model.generation_config, own)  # type: ignore[attr-defined]
    rows = [EncodedRow(np.array(ids, np.int64), np.arange(len(ids)) > 0) for ids in IDS]
    return np.concatenate(
        list(load_generator(folder, facts, engine, file, 1).supervised_logits(rows))  # type: ignore[arg-type]
    )


def with_outlier(architecture: CausalArchitecture, factor: float) -> CausalArchitecture:
    """Multiply one channel that norms pass on, and divide its weights: the same function, harder to quantize."""

    def changed(layer):  # type: ignore[no-untyped-def]
        scale = np.ones(len(layer.attention_norm.gamma), np.float32)
        scale[3] = factor
        part = layer.attention
        query, key, value = (
            replace(each, weight=each.weight / scale[:, None]) for each in (part.query, part.key, part.value)
        )
        norm = replace(layer.attention_norm, gamma=layer.attention_norm.gamma * scale)
        return replace(layer, attention_norm=norm, attention=replace(part, query=query, key=key, value=value))

    return replace(architecture, layers=[changed(layer) for layer in architecture.layers])


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "gpt2", "gpt_neox"])
def test_smoothing_keeps_the_function_and_int8_is_near_it(family: str, tmp_path: Path) -> None:
    model = random_model(family, scale=1.0)
    architecture = read_causal_architecture(model)
    save_graphs(architecture, None, directory=tmp_path, precision="fp32")
    expected = logits(model, tmp_path, "decoder.onnx")
    graph = standard_graph(tmp_path, "fp32")
    other = smoothed(architecture, graph, IDS, 0.5)
    (tmp_path / "smoothed").mkdir()
    save_graphs(other, None, directory=tmp_path / "smoothed", precision="fp32")
    found = logits(model, tmp_path / "smoothed", "decoder.onnx")
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()
    again = standard_graph(tmp_path / "smoothed", "fp32")
    static = static_int8(other, again, calibrate_graph(again, IDS).ranges("minmax"))
    save_graphs(static.architecture, 8, directory=tmp_path, precision="int8", ranges=static.ranges)
    rounded = logits(model, tmp_path, "decoder.int8.onnx")
    assert 0 < np.abs(rounded - expected).mean() < 0.1 * np.abs(expected).mean()
    kinds = [node.op_type for node in onnx.load(tmp_path / "model.int8.onnx", load_external_data=False).graph.node]
    assert kinds.count("MatMulIntegerToFloat") == len(activations_of(graph)) == len(static.ranges)
    assert kinds.count("MatMulNBits") == 1, "the head is rounded as it comes"
    # A kept part is in fp32.
    kept = [part for part in parts_of(architecture) if part != "layers.0.attention"]
    save_graphs(static.architecture, 8, directory=tmp_path, precision="int8", ranges=static.ranges, kept=kept)
    assert quantized_matrices(tmp_path / "decoder.int8.onnx") == 4


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_rounding_by_the_inputs_brings_quantized_forms_nearer(family: str, tmp_path: Path) -> None:
    model = random_model(family, scale=1.0)
    architecture = read_causal_architecture(model)
    save_graphs(architecture, None, directory=tmp_path, precision="fp32")
    graph = standard_graph(tmp_path, "fp32")
    rounding = Rounding()
    forms = quantized_forms(architecture, tmp_path, ExportOptions(int8=True, int4=True), rounding=rounding)
    assert len(forms) == 4
    factors = input_factors(graph, IDS)
    assert set(factors) == set(activations_of(graph))
    expected = logits(model, tmp_path, "decoder.onnx")
    errors = {}
    for learned in (False, True):
        if learned:
            rounding.learn(factors)
        for form in forms:
            form.save(kept=("embedding", "head"))  # which are rounded to the nearest
            found = logits(model, tmp_path, form.file.name, form.engine)
            errors[form.name, learned] = float(np.square(found - expected).mean())
    for form in forms:
        assert errors[form.name, True] < 0.9 * errors[form.name, False], errors


def test_an_explicit_option_calibrates_and_a_missed_limit_names_what_to_try(tmp_path: Path) -> None:
    assert not ExportOptions(int8=True).calibrates
    assert ExportOptions(int8=True, method="minmax").calibrates
    assert ExportOptions(int8=True, calibration_data="rows.jsonl").calibrates
    assert ExportOptions(
        int8=True, calibration_split="train", calibration_rows=512
    ).calibrates  # the defaults, but asked for
    architecture = read_causal_architecture(random_model("llama"))
    static = StaticInt8(architecture, {})
    [plain, fixed] = (quantized_forms(architecture, tmp_path, ExportOptions(int8=True), s)[0] for s in (None, static))
    assert plain.remedy == "a larger --max-drop"
    assert all(option in fixed.remedy for option in ("--smooth-quant", "--method", "--calibration-rows", "--max-drop"))


def test_smoothing_helps_where_a_channel_is_an_outlier(tmp_path: Path) -> None:
    model = random_model("llama", scale=1.0)
    architecture = with_outlier(read_causal_architecture(model), 300.0)
    save_graphs(architecture, None, directory=tmp_path, precision="fp32")
    expected = logits(model, tmp_path, "decoder.onnx")
    errors = []
    for alpha in (None, 0.5):
        folder = tmp_path / str(alpha)
        folder.mkdir()
        graph = standard_graph(tmp_path, "fp32")
        changed = architecture if alpha is None else smoothed(architecture, graph, IDS, alpha)
        save_graphs(changed, None, directory=folder, precision="fp32")
        graph = standard_graph(folder, "fp32")
        static = static_int8(changed, graph, calibrate_graph(graph, IDS).ranges("minmax"))
        save_graphs(static.architecture, 8, directory=folder, precision="int8", ranges=static.ranges)
        errors.append(float(np.abs(logits(model, folder, "decoder.int8.onnx") - expected).mean()))
    assert errors[1] < 0.5 * errors[0]
