"""Calibration of a translator: the inputs of its linear layers during translation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from transformers import MarianConfig, MarianMTModel

from deploykit.artifacts import load_manifest
from deploykit.errors import ExportError
from deploykit.graphs.families import read_architecture
from deploykit.graphs.seq2seq import build_decoder, build_encoder, read_graph, save_graphs
from deploykit.runtime.engines import TRANSLATION_FILES
from deploykit.runtime.engines.seq2seq import Seq2SeqModel
from deploykit.tasks.translation import calibration as translation_calibration
from deploykit.tasks.translation.calibration import activations_of, calibrate
from deploykit.tasks.translation.facts import Translation
from deploykit.tasks.translation.forced_decoding import greedy_translations, log_probabilities
from deploykit.tasks.translation.predictor import load_translator

TEXTS = [
    "Save the file.",
    "Do you want to open 3 folders, {name}?",
    "The quick brown fox jumps over the lazy dog.",
    "Yes",
]


def task_of(folder: Path) -> Translation:
    task = load_manifest(folder, verify=False).task
    assert isinstance(task, Translation)
    return task


def test_every_layer_is_seen_at_every_token_and_at_no_padding(tiny_translation: Path) -> None:
    task = task_of(tiny_translation)
    together = calibrate(tiny_translation, task, TEXTS)
    assert set(together.histograms) == activations_of(tiny_translation)
    alone = [calibrate(tiny_translation, task, [text]) for text in TEXTS]
    for name, histogram in together.histograms.items():
        parts = [calibration.histograms[name] for calibration in alone]
        assert histogram.counts.sum() == sum(part.counts.sum() for part in parts), name
        assert histogram.low == pytest.approx(min(part.low for part in parts), abs=1e-4)
        assert histogram.high == pytest.approx(max(part.high for part in parts), abs=1e-4)


def test_layers_that_read_the_same_tensor_see_the_same(
    make_tiny_translation: Callable[..., Path], tmp_path: Path
) -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    folder = make_tiny_translation(tmp_path / "t5", "t5", max_length=32)
    task = task_of(folder)
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=task.vocabulary, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0,
        feed_forward_proj="gated-gelu", initializer_factor=3.0,
    )  # fmt: skip
    architecture = read_architecture(T5ForConditionalGeneration(config).eval())
    save_graphs(folder, build_encoder(architecture), build_decoder(architecture), TRANSLATION_FILES["fp32"])
    histograms = calibrate(folder, task, TEXTS).histograms
    tokens = histograms["decoder.0.cross.query"].counts.sum()
    for layer in ("decoder.0", "decoder.1"):
        up, gate, down = (histograms[f"{layer}.feed_forward.{part}"] for part in ("up", "gate", "down"))
        assert (up.low, up.high) == (gate.low, gate.high)
        np.testing.assert_array_equal(up.counts, gate.counts)
        assert (up.counts.sum(), down.counts.sum()) == (tokens, 2 * tokens), "64 values, where 32 go in"


def test_caches_that_are_large_are_int8(
    make_tiny_translation: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_tiny_translation(tmp_path / "marian", "marian", max_length=32)
    task = task_of(folder)
    assert not any(name.startswith("caches.") for name in activations_of(folder)), "these are small"
    monkeypatch.setattr(translation_calibration, "_LARGE_CACHES", 0)
    torch.manual_seed(0)
    size = task.vocabulary
    config = MarianConfig(
        vocab_size=size, decoder_vocab_size=size, pad_token_id=size - 1, eos_token_id=0, decoder_start_token_id=size - 1,
        d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=64, init_std=0.3,
    )  # fmt: skip
    architecture = read_architecture(MarianMTModel(config).eval())
    save_graphs(folder, build_encoder(architecture), build_decoder(architecture), TRANSLATION_FILES["fp32"])
    calibration = calibrate(folder, task, TEXTS)
    assert set(calibration.histograms) == activations_of(folder)
    values = {name: histogram.counts.sum() for name, histogram in calibration.histograms.items()}
    for part in ("key", "value"):
        assert values[f"caches.1.self_{part}"] == values["decoder.1.self.qkv"], "32 of each token, as go in"
        assert values[f"caches.1.cross_{part}"] == values["cross"]

    pairs = greedy_translations(load_translator(folder, task, TRANSLATION_FILES["fp32"], 1), TEXTS)
    only_caches = {n: r for n, r in calibration.ranges("minmax").items() if n.startswith("caches.")}
    found = [log_probabilities(Seq2SeqModel(folder, TRANSLATION_FILES["fp32"], 1), task, pairs)]
    for ranges in ({}, only_caches):
        save_graphs(
            folder, build_encoder(architecture, ranges), build_decoder(architecture, ranges), TRANSLATION_FILES["int8"]
        )
        found.append(log_probabilities(Seq2SeqModel(folder, TRANSLATION_FILES["int8"], 1), task, pairs))
    fp32, small, also_caches = found
    assert np.abs(small - fp32).max() > 0, "an INT8 embedding"
    assert 0 < np.abs(also_caches - small).mean() < 0.1 * np.abs(fp32).mean()
    model = Seq2SeqModel(folder, TRANSLATION_FILES["int8"], 1)
    assert model.encode([[5, 6, 0]]).dtype == np.int8
    assert model.cache_bytes(4, 8, 8) == Seq2SeqModel(folder, TRANSLATION_FILES["fp32"], 1).cache_bytes(4, 8, 8) / 4


def test_a_graph_of_another_writer_is_refused(tiny_translation: Path, tmp_path: Path) -> None:
    graph = read_graph(tiny_translation / "encoder.onnx")
    del graph.model.metadata_props[:]
    onnx.save(graph.model, tmp_path / "encoder.onnx")
    with pytest.raises(ExportError, match=r"encoder\.onnx: its metadata does not name the linear layers"):
        read_graph(tmp_path / "encoder.onnx")


def test_forced_log_probabilities_are_those_of_the_search(tiny_translation: Path) -> None:
    task = task_of(tiny_translation)
    files = TRANSLATION_FILES["fp32"]
    translator = load_translator(tiny_translation, task, files, 1)
    pairs = greedy_translations(translator, TEXTS)
    model = Seq2SeqModel(tiny_translation, files, 1)
    given = np.split(log_probabilities(model, task, pairs), np.cumsum([len(pair.target) for pair in pairs])[:-1])
    assert model.rows == 0
    for pair, found in zip(pairs, given):
        (alone,) = [log_probabilities(model, task, [pair])]
        np.testing.assert_allclose(found, alone, atol=1e-5)
        assert len(found) == len(pair.target) <= 32
        assert (found <= 0).all()
