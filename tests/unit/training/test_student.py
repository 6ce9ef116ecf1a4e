"""Models of some of the layers of another."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import language_models
import pytest
import torch
import translators
from transformers import AutoModelForSequenceClassification, GenerationConfig, ModernBertConfig

from deploykit.errors import UsageError
from deploykit.training.last_end_token import read_last_end
from deploykit.training.student import keep_layers


def test_layers_are_kept_evenly_and_the_student_can_be_loaded(
    make_tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    path = make_tiny_checkpoint(tmp_path / "m")
    model = AutoModelForSequenceClassification.from_pretrained(path, num_hidden_layers=3).eval()  # the third is random
    student, kept = keep_layers(model, 2)
    assert kept == [0, 2]
    assert (student.config.num_hidden_layers, model.config.num_hidden_layers) == (2, 3)
    assert torch.equal(
        student.bert.encoder.layer[1].attention.self.query.weight,
        model.bert.encoder.layer[2].attention.self.query.weight,
    )
    student.save_pretrained(tmp_path / "student")
    loaded = type(student).from_pretrained(tmp_path / "student").eval()
    ids = torch.tensor([[2, 5, 6, 3]])
    with torch.inference_mode():
        torch.testing.assert_close(loaded(input_ids=ids).logits, student(input_ids=ids).logits)
        model.bert.encoder.layer = torch.nn.ModuleList([model.bert.encoder.layer[0], model.bert.encoder.layer[2]])
        torch.testing.assert_close(model(input_ids=ids).logits, student(input_ids=ids).logits)
    with pytest.raises(UsageError, match="--student asks for 2 layers, and the model has 2"):
        keep_layers(student, 2)


def test_layers_keep_their_kind_of_attention() -> None:
    config = ModernBertConfig(
        vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=4, num_attention_heads=2, pad_token_id=0,
        layer_types=["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
    )  # fmt: skip
    student, kept = keep_layers(AutoModelForSequenceClassification.from_config(config), 3)
    assert kept == [0, 2, 3]
    assert student.config.layer_types == ["full_attention", "sliding_attention", "full_attention"]


@pytest.mark.parametrize("family", translators.FAMILIES)
def test_either_side_of_a_translator_is_cut(family: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = translators.FAMILIES[family]().eval()
    model.generation_config = GenerationConfig(
        max_length=9, num_beams=2, decoder_start_token_id=1, pad_token_id=0, eos_token_id=2
    )
    if family == "marian, uneven":  # three layers and one
        model, kept = keep_layers(model, 2, "encoder")
        assert kept == [0, 2]
    else:
        model, _ = keep_layers(model, 1, "decoder")
    encoder, decoder = model.get_encoder(), model.get_decoder()
    layers = [len(getattr(side, "layers", None) or side.block) for side in (encoder, decoder)]
    assert layers == [2, 1]
    assert _writes_alike(model, tmp_path, torch.tensor([[5, 6, 7, 2]]))


@pytest.mark.parametrize("family", language_models.FAMILIES)
def test_a_language_model_is_cut(family: str, tmp_path: Path) -> None:
    model, kept = keep_layers(language_models.random_model(family), 1)
    assert kept == [0]
    model.generation_config = GenerationConfig(max_new_tokens=6, pad_token_id=5, eos_token_id=2)
    assert _writes_alike(model, tmp_path, torch.tensor([[5, 6, 7, 8]]))


def _writes_alike(model: Any, folder: Path, ids: torch.Tensor) -> bool:
    """Whether a student that was saved and loaded again writes the same, with its caches and without."""
    model.save_pretrained(folder)
    loaded = type(model).from_pretrained(folder, attn_implementation="eager").eval()
    with torch.inference_mode():
        written = [
            each.eval().generate(ids, attention_mask=torch.ones_like(ids), use_cache=cached).tolist()
            for each in (model, loaded)
            for cached in (True, False)
        ]
    return written[1:] == written[:-1]


def test_a_student_of_a_bart_reads_the_last_end_token_of_each_row() -> None:
    """Its encoder has another number of layers than its decoder, as distilbart-mnli-12-3."""
    from transformers import BartConfig

    config = BartConfig(
        vocab_size=20, d_model=8, encoder_layers=3, decoder_layers=1, encoder_attention_heads=1, pad_token_id=1,
        decoder_attention_heads=1, encoder_ffn_dim=8, decoder_ffn_dim=8, max_position_embeddings=16,
    )  # fmt: skip
    model = read_last_end(AutoModelForSequenceClassification.from_config(config).eval())
    student, kept = keep_layers(model, 2)
    assert kept == [0, 2]
    rows = torch.tensor([[0, 5, 2, 6, 2], [0, 5, 6, 7, 2]])
    together = student(input_ids=rows).logits
    for row, expected in zip(rows, together):
        torch.testing.assert_close(student(input_ids=row[None]).logits[0], expected)
