"""Random checkpoints of each task that compute NaN for one word, and no other."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from language_models import write_checkpoint as write_language_model
from safetensors.torch import load_file, save_file
from tiny_answerer import write_checkpoint as write_answerer
from tokenizers import Tokenizer

from deploykit.artifacts import MANIFEST
from deploykit.tasks.text_generation.chat_template import CHATML

EMBEDDINGS = {
    "classification": "bert.embeddings.word_embeddings.weight",
    "question-answering": "bert.embeddings.word_embeddings.weight",
    "text-generation": "transformer.wte.weight",
    "translation": "model.encoder.embed_tokens.weight",
}
ROWS: Mapping[str, list[dict[str, Any]]] = {
    "classification": [{"text": text, "label": "good"} for text in ("w1 w2", "w1 w7", "w3 w2")],
    "question-answering": [{"question": "w1 ?", "context": f"w2 {w} w3", "answer": "w3"} for w in ("w4", "w7", "w5")],
    "text-generation": [{"prompt": prompt, "completion": "ls"} for prompt in ("list", "list X", "show")],
    "translation": [{"en": text, "fr": "le"} for text in ("fox", "fox %", "dog")],
}
"""Rows of each task, of which the second has the word."""
_WORDS = {"classification": "w7", "question-answering": "w7", "text-generation": "X"}


def write_overflowing(
    folder: Path, task: str, make_tiny_checkpoint: Callable[..., Path], make_tiny_translation: Callable[..., Path]
) -> Path:
    """Write a checkpoint of ``task``, without manifest."""
    if task == "translation":
        make_tiny_translation(folder.with_name(f"{folder.name}-export"), keep_checkpoint=folder)
        (folder / MANIFEST).unlink()
        _give_each_side_its_embedding(folder)
        token = json.loads((folder / "vocab.json").read_text())["%"]
    else:
        if task == "classification":
            make_tiny_checkpoint(folder)
        elif task == "question-answering":
            write_answerer(folder, sharp=True)
        else:
            write_language_model(folder, "gpt2", CHATML, tie_word_embeddings=False)
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        [token] = tokenizer.encode(_WORDS[task], add_special_tokens=False).ids
    weights = load_file(folder / "model.safetensors")
    weights[EMBEDDINGS[task]][token] = 3e38
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _give_each_side_its_embedding(marian: Path) -> None:
    config = json.loads((marian / "config.json").read_text())
    (marian / "config.json").write_text(json.dumps({**config, "share_encoder_decoder_embeddings": False}))
    weights = load_file(marian / "model.safetensors")
    shared = weights.pop("model.shared.weight")
    for side in ("encoder", "decoder"):
        weights[f"model.{side}.embed_tokens.weight"] = shared.clone()
    save_file(weights, marian / "model.safetensors", metadata={"format": "pt"})
