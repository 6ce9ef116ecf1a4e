"""The engine ``native`` on classifiers compared with PyTorch on the same weights, and its errors for broken files."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from native_encoders import PAD, VOCABULARY, padded, random_model, runs_here, texts_of
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from deploykit.errors import ArtifactError, CorruptArtifactError, EngineError, ExportError
from deploykit.graphs import encoder_export
from deploykit.graphs.encoders import FAMILIES, read_encoder
from deploykit.graphs.export_options import ExportOptions
from deploykit.graphs.native_encoder import linear_parts, save_native_encoder
from deploykit.runtime.engines import NATIVE_FILE
from deploykit.runtime.engines.native.encoder import NativeEngine
from deploykit.runtime.engines.native.loader import VARIABLE, instruction_sets
from deploykit.runtime.find_graphs import find_graphs
from deploykit.stages.export import export
from deploykit.tasks.classification.checkpoint import TorchClassifier

LONGEST = 200


@cache
def model_of(family: str, **settings: Any) -> Any:
    return random_model(AutoModelForSequenceClassification, family, layers=3, longest=LONGEST, num_labels=3, **settings)


def by_torch(model: Any, texts: Sequence[Sequence[int]]) -> Any:
    with torch.inference_mode():
        return model(**{name: torch.from_numpy(array) for name, array in padded(texts).items()}).logits.numpy()


def save(folder: Path, family: str, int8: Sequence[str] | None = None) -> Path:
    """Save a classifier with all layers in INT8, or only those named."""
    encoder = read_encoder(model_of(family))
    parts = linear_parts(encoder) if int8 is None else int8
    path = folder / f"{family}-{len(parts)}.safetensors"  # do not overwrite a mapped file
    save_native_encoder(path, encoder, parts)
    return path


@runs_here
@pytest.mark.parametrize("family", FAMILIES)
def test_it_computes_what_pytorch_does(family: str, tmp_path: Path) -> None:
    texts = texts_of(1, 2, 3, 16, 17, 31, 64, 65, 150, LONGEST)
    expected = by_torch(model_of(family), texts)
    whole, rounded = NativeEngine(save(tmp_path, family, []), 2), NativeEngine(save(tmp_path, family), 2)
    assert (whole.int8_kernels(), rounded.int8_kernels()) == (0, 12)
    error = np.abs(whole.run(padded(texts))[0] - expected)
    assert error.mean() < 0.01 * expected.std(), "embeddings and attention are rounded all the same"
    errors = np.abs(rounded.run(padded(texts))[0] - expected)
    assert error.mean() < errors.mean() < 0.05 * expected.std()


@runs_here
@pytest.mark.parametrize("family", FAMILIES)
def test_a_text_may_name_the_padding_token(family: str, tmp_path: Path) -> None:
    """RoBERTa and its descendants count no position for it."""
    texts = [[PAD, *text[:9], PAD, PAD, *text[9:]] for text in texts_of(12, 40, 150)]
    expected = by_torch(model_of(family), texts)
    error = np.abs(NativeEngine(save(tmp_path, family, []), 2).run(padded(texts))[0] - expected)
    assert error.mean() < 0.01 * expected.std()


@runs_here
@pytest.mark.parametrize("family", ["bert", "mpnet"])
def test_a_texts_bits_depend_on_neither_batch_nor_threads(family: str, tmp_path: Path) -> None:
    path = save(tmp_path, family, [part for part in linear_parts(read_encoder(model_of(family))) if part != "1.up"])
    texts = texts_of(*range(1, 40), 199, 7, 64, 150, 3, 130, 128, 5)
    alone = np.concatenate([NativeEngine(path, 1).run(padded([text]))[0] for text in texts])
    for threads in (1, 2, 5):
        engine = NativeEngine(path, threads)
        assert (engine.run(padded(texts))[0] == alone).all()
        assert (engine.run(padded(texts[::-1]))[0] == alone[::-1]).all()
        assert (engine.run(padded(texts[20:23]))[0] == alone[20:23]).all()


@runs_here
@pytest.mark.parametrize("family", ["bert", "mpnet"])
def test_every_instruction_set_gives_the_same_bits(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, texts = save(tmp_path, family), padded(texts_of(1, 2, 33, 64, 17))
    expected = NativeEngine(path, 2).run(texts)[0]
    for name in instruction_sets():
        monkeypatch.setenv(VARIABLE, name)
        assert (NativeEngine(path, 2).run(texts)[0] == expected).all(), name


@runs_here
def test_layers_that_are_not_named_stay_float32(tmp_path: Path) -> None:
    texts = texts_of(5, 9, 30)
    expected = by_torch(model_of("bert"), texts)
    parts = linear_parts(read_encoder(model_of("bert")))
    some = NativeEngine(save(tmp_path, "bert", parts[:4]), 1)
    assert some.int8_kernels() == 4
    kept = np.abs(some.run(padded(texts))[0] - expected).mean()
    assert kept < np.abs(NativeEngine(save(tmp_path, "bert"), 1).run(padded(texts))[0] - expected).mean()


@pytest.mark.parametrize(
    ("family", "settings", "says"),
    [
        ("albert", {}, "not albert"),
        ("electra", {"embedding_size": 16}, "electra has the unknown part electra.embeddings_project"),
        ("bert", {"hidden_act": "quick_gelu"}, "activation 'quick_gelu'"),
        ("bert", {"is_decoder": True}, "has another kind of attention"),
        ("bert", {"hidden_size": 260, "num_attention_heads": 1}, "heads of 260 values"),
    ],
)
def test_a_model_that_computes_something_else_is_refused(family: str, settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ExportError, match=says):
        read_encoder(model_of(family, **settings))


def test_an_export_reports_why_native_is_unsupported(make_tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    checkpoint = make_tiny_checkpoint(tmp_path / "checkpoint", "roberta-prelayernorm")
    rows, said = tmp_path / "rows.jsonl", list[str]()
    rows.write_text(
        "\n".join(json.dumps({"text": f"w{i} w{i + 1}", "label": ("bad", "good")[i % 2]}) for i in range(8))
    )
    options = ExportOptions(calibration_data=str(rows), int8=True, max_drop=100, data=str(rows))
    manifest = export(checkpoint, tmp_path / "out", options, say=said.append).manifest
    (line,) = (line for line in said if "native" in line)
    assert line.startswith("nothing for the engine native: it runs bert, ")
    assert line.endswith(", not roberta-prelayernorm")
    assert NATIVE_FILE not in manifest.files
    assert find_graphs(tmp_path / "out", manifest, engine="auto", precision="int8").engine == "openvino"
    with pytest.raises(ArtifactError, match="has no int8 graph for the engine native"):
        find_graphs(tmp_path / "out", manifest, engine="native", precision="int8", to_run=False)


@runs_here
def test_layers_that_int8_ruins_stay_float32(
    make_tiny_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Two values of the first layer's attention are so large that one quantization step exceeds all others."""
    checkpoint = make_tiny_checkpoint(tmp_path / "checkpoint")
    weights = load_file(checkpoint / "model.safetensors")
    block = "bert.encoder.layer.0.attention"
    for name in ("weight", "bias"):
        weights[f"{block}.self.value.{name}"][[1, 20]] *= 1e5
    weights[f"{block}.output.dense.weight"][:, [1, 20]] /= 1e5
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    random = np.random.default_rng(0)
    texts = [" ".join(random.choice([f"w{i}" for i in range(200)], n)) for n in random.integers(3, 25, 120)]
    scores = TorchClassifier.load(checkpoint).scores(texts)
    weights["classifier.bias"][0] += np.median(np.log(scores[:, 1] / scores[:, 0]))  # either label for half of them
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    model = TorchClassifier.load(checkpoint)
    answers = model.task.decide(model.scores(texts))
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"text": text, "label": label}) for text, label in zip(texts, answers)))
    monkeypatch.setattr(
        encoder_export, "engines_for", lambda precision: ["native" if precision == "int8" else "onnxruntime"]
    )
    options = ExportOptions(calibration_data=str(rows), int8=True, max_drop=15, data=str(rows))
    quantization = export(checkpoint, tmp_path / "out", options, say=lambda line: None).manifest.metrics["quantization"]
    assert quantization["search"]["native"]["kept"] == ("0.out",)
    assert NativeEngine(tmp_path / "out" / NATIVE_FILE, 1).int8_kernels() == 7


@runs_here
@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda content: b"", "not a weight file"),
        (lambda content: content[:-64], "is truncated"),
        (lambda content: content.replace(b'\\"head\\"', b'\\"tail\\"'), "head"),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, damage: Callable[[bytes], bytes], says: str) -> None:
    file = save(tmp_path, "bert")
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(CorruptArtifactError, match=says) as caught:
        NativeEngine(file, 1)
    assert str(file) in caught.value.message


@runs_here
def test_tokens_and_positions_out_of_range_are_refused(tmp_path: Path) -> None:
    engine = NativeEngine(save(tmp_path, "roberta"), 1)
    with pytest.raises(EngineError, match=f"texts of 1 to {LONGEST} tokens"):
        engine.run(padded(texts_of(LONGEST + 1)))
    for token in (-1, VOCABULARY):
        with pytest.raises(EngineError, match=f"one of the model's {VOCABULARY}"):
            engine.run(padded([[token, 5]]))
    with pytest.raises(EngineError, match="1 to"):
        engine.run({name: array * 0 for name, array in padded([[5]]).items()})
