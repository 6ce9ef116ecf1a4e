"""A checkpoint that computes NaN or infinity for a row is not exported: its INT8 form would hide it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from language_models import write_checkpoint as write_language_model
from safetensors.torch import load_file, save_file
from tiny_answerer import write_checkpoint as write_answerer
from tokenizers import Tokenizer

from deploykit.artifacts import MANIFEST
from deploykit.errors import DataError
from deploykit.graphs.export_options import ExportOptions
from deploykit.quantization.calibration import Observe, collect
from deploykit.stages.export import export
from deploykit.tasks.text_generation.chat_template import CHATML

EMBEDDINGS = {
    "classification": "bert.embeddings.word_embeddings.weight",
    "question-answering": "bert.embeddings.word_embeddings.weight",
    "text-generation": "transformer.wte.weight",
    "translation": "model.encoder.embed_tokens.weight",
}


def overflow_at(checkpoint: Path, embedding: str, token: int) -> None:
    weights = load_file(checkpoint / "model.safetensors")
    weights[embedding][token] = 3e38
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})


def give_each_side_its_embedding(marian: Path) -> None:
    config = json.loads((marian / "config.json").read_text())
    (marian / "config.json").write_text(json.dumps({**config, "share_encoder_decoder_embeddings": False}))
    weights = load_file(marian / "model.safetensors")
    shared = weights.pop("model.shared.weight")
    for side in ("encoder", "decoder"):
        weights[f"model.{side}.embed_tokens.weight"] = shared.clone()
    save_file(weights, marian / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture
def broken(
    task: str, tmp_path: Path, make_tiny_checkpoint: Callable[..., Path], make_tiny_translation: Callable[..., Path]
) -> tuple[Path, list[Mapping[str, Any]]]:
    """A checkpoint, and rows of which the second alone makes it overflow."""
    folder = tmp_path / "checkpoint"
    if task == "classification":
        make_tiny_checkpoint(folder)
        rows = [{"text": text, "label": "good"} for text in ("w1 w2", "w1 w7", "w3 w2")]
        word = "w7"
    elif task == "question-answering":
        write_answerer(folder, sharp=True)
        rows = [{"question": "w1 ?", "context": f"w2 {w} w3", "answer": "w3"} for w in ("w4", "w7", "w5")]
        word = "w7"
    elif task == "text-generation":
        write_language_model(folder, "gpt2", CHATML, tie_word_embeddings=False)
        rows = [{"prompt": prompt, "completion": "ls"} for prompt in ("list", "list X", "show")]
        word = "X"
    else:
        make_tiny_translation(tmp_path / "export", keep_checkpoint=folder)
        (folder / MANIFEST).unlink()
        rows = [{"en": text, "fr": "le"} for text in ("fox", "fox %", "dog")]
        give_each_side_its_embedding(folder)
        overflow_at(folder, EMBEDDINGS[task], json.loads((folder / "vocab.json").read_text())["%"])
        return folder, rows
    overflow_at(
        folder,
        EMBEDDINGS[task],
        Tokenizer.from_file(str(folder / "tokenizer.json")).encode(word, add_special_tokens=False).ids[0],
    )
    return folder, rows


@pytest.mark.parametrize("task", EMBEDDINGS)
def test_an_export_names_the_row_without_numbers(
    task: str, broken: tuple[Path, Sequence[Mapping[str, Any]]], tmp_path: Path
) -> None:
    checkpoint, rows = broken
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    languages = {"source_lang": "en", "target_lang": "fr"} if task == "translation" else {}
    options = ExportOptions(data=str(data), **languages)
    with pytest.raises(DataError, match=r"^rows\.jsonl:2: the model computed no number for this text"):
        export(checkpoint, tmp_path / "out", options, say=lambda line: None)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_calibration_refuses_activations_that_are_no_numbers(value: float) -> None:
    def run(observe: Observe) -> None:
        observe("layer", np.float32([[0.0, 1.0]]))
        observe("layer", np.float32([[value, 1.0]]))

    with pytest.raises(DataError, match=r"computes NaN or infinity for a calibration row \(layer\)"):
        collect(run, 2, "digest")
