"""The engine ``native`` on encoders with a head for every token, compared with PyTorch on the same weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from native_encoders import padded, random_model, runs_here, texts_of
from transformers import AutoModelForQuestionAnswering

from deploykit.errors import ExportError
from deploykit.graphs.encoders import FAMILIES, read_encoder
from deploykit.graphs.native_encoder import linear_parts, save_native_encoder
from deploykit.runtime.engines.native.encoder import NativeEngine
from deploykit.runtime.engines.native.loader import VARIABLE, instruction_sets

LONGEST = 400
TYPED = ("bert", "electra")


def model_of(family: str) -> Any:
    typed = {"type_vocab_size": 2} if family in TYPED else {}
    return random_model(AutoModelForQuestionAnswering, family, layers=2, longest=LONGEST, **typed)


def save(folder: Path, model: Any, int8: Sequence[str] | None = None) -> Path:
    encoder = read_encoder(model, typed=model.config.model_type in TYPED, token_head="qa_outputs")
    parts = linear_parts(encoder) if int8 is None else int8
    path = folder / f"{len(parts)}.safetensors"  # do not overwrite a mapped file
    save_native_encoder(path, encoder, parts)
    return path


def by_torch(model: Any, inputs: dict[str, Any]) -> list[Any]:
    with torch.inference_mode():
        output = model(**{name: torch.from_numpy(array) for name, array in inputs.items()})
    return [logits.numpy() * inputs["attention_mask"] for logits in (output.start_logits, output.end_logits)]


@runs_here
@pytest.mark.parametrize("family", FAMILIES)
def test_every_token_has_pytorchs_logits(family: str, tmp_path: Path) -> None:
    model, inputs = model_of(family), padded(texts_of(1, 2, 17, 64, 150, LONGEST))
    if family in TYPED:
        inputs["token_type_ids"] = np.arange(inputs["input_ids"].shape[1]) // 5 % 2 * inputs["attention_mask"]
    expected = by_torch(model, inputs)
    whole, rounded = NativeEngine(save(tmp_path, model, []), 2), NativeEngine(save(tmp_path, model), 2)
    assert (whole.int8_kernels(), rounded.int8_kernels()) == (0, 8)
    for exact, whole_found, rounded_found in zip(expected, whole.run(inputs), rounded.run(inputs), strict=True):
        assert whole_found.shape == rounded_found.shape == exact.shape
        assert not whole_found[inputs["attention_mask"] == 0].any(), "padding is 0"
        error, errors = np.abs(whole_found - exact), np.abs(rounded_found - exact)
        assert error.mean() < 0.01 * exact.std(), "embeddings and attention are rounded all the same"
        assert error.mean() < errors.mean() < 0.05 * exact.std()


@runs_here
def test_a_texts_bits_depend_on_neither_batch_nor_threads_nor_instruction_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, texts = save(tmp_path, model_of("bert")), texts_of(*range(1, 30), 399, 7, 64, 256, 3, 300, 128, 310, 200)
    alone = [NativeEngine(path, 1).run(padded([text])) for text in texts]
    for name in instruction_sets():
        monkeypatch.setenv(VARIABLE, name)
        for threads in (1, 2, 5):
            for found, side in zip(NativeEngine(path, threads).run(padded(texts)), (0, 1), strict=True):
                assert all((row[: len(one[side][0])] == one[side][0]).all() for row, one in zip(found, alone)), name


def test_a_model_whose_head_has_another_name_is_refused() -> None:
    with pytest.raises(ExportError, match=r"this bert lacks classifier\.weight"):
        read_encoder(model_of("bert"), token_head="classifier")
