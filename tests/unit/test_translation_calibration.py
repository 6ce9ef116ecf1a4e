"""What goes into the linear layers of a translator while it translates."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from deploykit.artifacts import load_manifest
from deploykit.errors import ExportError
from deploykit.export.families import read_architecture
from deploykit.export.forced_decoding import greedy_translations, log_probabilities
from deploykit.export.seq2seq_graph import build_decoder, build_encoder, read_graph, save_graphs
from deploykit.export.translation_calibration import activations_of, calibrate
from deploykit.runtime.engines import TRANSLATION_FILES
from deploykit.runtime.engines.seq2seq import Seq2SeqModel
from deploykit.runtime.translator import load_translator
from deploykit.tasks import Translation

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


def test_a_graph_of_another_writer_is_refused(tiny_translation: Path, tmp_path: Path) -> None:
    graph = read_graph(tiny_translation / "encoder.onnx")
    del graph.model.metadata_props[:]
    onnx.save(graph.model, tmp_path / "encoder.onnx")
    with pytest.raises(ExportError, match=r"encoder\.onnx: does not name its linear layers"):
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
