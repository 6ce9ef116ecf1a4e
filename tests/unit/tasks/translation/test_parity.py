"""Parity of whole translations: only ties may be decided differently."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from deploykit.errors import ExportError
from deploykit.graphs.families import read_architecture
from deploykit.graphs.seq2seq import build_decoder, build_encoder, save_graphs
from deploykit.runtime.engines import TRANSLATION_FILES
from deploykit.runtime.engines.seq2seq import Seq2SeqModel
from deploykit.runtime.generation import Generation
from deploykit.tasks.translation.checkpoint import TorchTranslator
from deploykit.tasks.translation.facts import Translation
from deploykit.tasks.translation.parity import check_parity

_SOURCES = [[5, 9, 7, 0], [3, 8, 12, 14, 0], [21, 4, 0]]


class _Moved(Seq2SeqModel):
    """The graphs with one token's logit slightly changed."""

    token, by = 0, 0.0

    def step(self, tokens: Any) -> Any:
        logits = super().step(tokens)
        logits[:, self.token] += np.float32(self.by)
        return logits


def case(folder: Path, gap: float) -> tuple[TorchTranslator, _Moved]:
    """Return a Marian in which one token's logit is always ``gap`` below the most frequent token's, and both continue
    differently."""
    from transformers import MarianConfig, MarianMTModel

    torch.manual_seed(1)
    config = MarianConfig(
        vocab_size=40, decoder_vocab_size=40, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, max_position_embeddings=32, pad_token_id=39,
        eos_token_id=0, decoder_start_token_id=39, share_encoder_decoder_embeddings=False, tie_word_embeddings=False,
        init_std=0.6,
    )  # fmt: skip
    model = MarianMTModel._from_config(config, attn_implementation="eager").eval()
    task = Translation(
        "en", "fr", "marian", 40, 32, 32, 39, (0,), 39, generation=Generation(max_length=8, no_repeat_ngram_size=1)
    )
    reference = object.__new__(TorchTranslator)
    reference.task, reference.model = task, model
    first = reference.generate_ids(_SOURCES, task.generation)[0][0]
    twin = 38 if first < 38 else 37  # of equals PyTorch picks the first
    with torch.no_grad():
        model.lm_head.weight[twin] = model.lm_head.weight[first]
        model.final_logits_bias[0, twin] = model.final_logits_bias[0, first] - gap
    architecture = read_architecture(model)
    folder.mkdir()
    save_graphs(folder, build_encoder(architecture), build_decoder(architecture), TRANSLATION_FILES["fp32"])
    moved = _Moved(folder, TRANSLATION_FILES["fp32"], 1)
    moved.token = twin
    reference.decode = lambda rows: [str(list(row)) for row in rows]  # type: ignore[method-assign]
    return reference, moved


def test_a_near_tie_is_counted_although_later_tokens_differ(tmp_path: Path) -> None:
    reference, model = case(tmp_path / "e", gap=0.0)
    model.by = 2e-5
    reference.model.generation_config = reference_config(reference)
    parity = check_parity(reference, model, _SOURCES)
    assert all(g.equal + g.ties == len(_SOURCES) for g in parity.generations)
    assert parity.generations[0].ties > 0


def test_a_difference_beyond_rounding_is_an_error(tmp_path: Path) -> None:
    reference, model = case(tmp_path / "e", gap=3e-4)
    model.by = 6e-4  # less than what is tolerated of a logit
    reference.model.generation_config = reference_config(reference)
    with pytest.raises(ExportError, match="translated differently"):
        check_parity(reference, model, _SOURCES)


def reference_config(reference: TorchTranslator) -> Any:
    from deploykit.tasks.translation.generation_config import generation_config

    return generation_config(reference.task, reference.task.generation)


def test_a_target_vocabulary_may_be_larger_than_the_sources_and_have_the_padding_id(tmp_path: Path) -> None:
    from transformers import MarianConfig, MarianMTModel

    from deploykit.tasks.translation.token_batches import EncodedPairs

    torch.manual_seed(1)
    config = MarianConfig(
        vocab_size=30, decoder_vocab_size=60, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, max_position_embeddings=32, pad_token_id=29,
        eos_token_id=0, decoder_start_token_id=59, share_encoder_decoder_embeddings=False, tie_word_embeddings=False,
        init_std=0.6,
    )  # fmt: skip
    reference = object.__new__(TorchTranslator)
    reference.model = MarianMTModel._from_config(config, attn_implementation="eager").eval()
    reference.task = Translation("en", "fr", "marian", 60, 32, 32, 59, (0,), 59, generation=Generation(max_length=8))
    together = reference.generate_ids(_SOURCES, reference.task.generation)
    assert together == [reference.generate_ids([ids], reference.task.generation)[0] for ids in _SOURCES]
    assert len(reference.scores(_SOURCES, together, reference.task.generation)) == len(_SOURCES)
    pairs = EncodedPairs.__new__(EncodedPairs)
    pairs.task, pairs._source_pad = reference.task, reference.source_pad
    assert reference.model(**pairs.collate(list(zip(_SOURCES, together)))).loss.isfinite()
