"""Checkpoints trained elsewhere: token types, and models that cannot be served."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from answering_families import FAMILIES
from tiny_answerer import write_checkpoint
from transformers import AutoConfig, AutoModelForQuestionAnswering, AutoModelForSequenceClassification

from deploykit.errors import ArtifactError, UsageError
from deploykit.tasks.question_answering.checkpoint import TorchAnswerer
from deploykit.tasks.question_answering.facts import QuestionAnswering
from deploykit.training.checkpoint import load_for_training

TYPED = {"bert", "electra", "albert"}
SIZES = {
    "vocab_size": 999,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}


@pytest.mark.parametrize("family", FAMILIES)
def test_token_types_are_those_that_transformers_4_gives(family: str, tmp_path: Path) -> None:
    task = TorchAnswerer.load(write_checkpoint(tmp_path / "model", family)).task
    assert task.token_types == (family in TYPED)


def _with_model(folder: Path, kind: str, **sizes: Any) -> Path:
    """Write a BERT's tokenizer with a random model of another kind."""
    write_checkpoint(folder)
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, initializer_range=0.3, **sizes)
    AutoModelForQuestionAnswering.from_config(config).save_pretrained(folder)
    return folder


def test_a_model_that_padding_confuses_is_refused(tmp_path: Path) -> None:
    folder = _with_model(tmp_path / "model", "fnet", **SIZES)
    with pytest.raises(UsageError, match="of type fnet answer otherwise when a text is padded"):
        TorchAnswerer.load(folder)


def test_a_head_of_three_outputs_is_refused(tmp_path: Path) -> None:
    folder = _with_model(tmp_path / "model", "bert", num_labels=3, **SIZES)
    with pytest.raises(ArtifactError, match="its head has 3 outputs for each token, and an answer needs two"):
        TorchAnswerer.load(folder)


def test_a_model_whose_answers_nothing_checks_is_refused(tmp_path: Path) -> None:
    folder = _with_model(tmp_path / "model", "xlnet", vocab_size=999, d_model=32, n_layer=2, n_head=2, d_inner=64)
    with pytest.raises(UsageError, match="of type xlnet have no answers to compare with"):
        TorchAnswerer.load(folder)


def test_a_model_that_does_not_run_is_refused(tmp_path: Path) -> None:
    """The tokenizer separates with one token, Longformer wants two."""
    folder = _with_model(tmp_path / "model", "longformer", attention_window=[16, 16], **SIZES)
    with pytest.raises(
        UsageError, match="of type longformer do not run on a short text: There should be exactly three"
    ):
        TorchAnswerer.load(folder)


def test_a_model_that_computes_no_numbers_is_refused(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model")
    model = AutoModelForQuestionAnswering.from_pretrained(folder)
    with torch.no_grad():
        model.bert.embeddings.LayerNorm.weight.fill_(3e38)
    model.save_pretrained(folder)
    with pytest.raises(ArtifactError, match="computes NaN or infinity for a short text"):
        TorchAnswerer.load(folder)


def test_settings_that_leave_token_types_out_are_kept(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model")
    settings = folder / "tokenizer_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "model_input_names": ["input_ids"]}))
    assert not TorchAnswerer.load(folder).task.token_types


def test_longformer_reads_contexts_with_separators_of_their_own(tmp_path: Path) -> None:
    """transformers computes the global attention of windows with three separators only."""
    folder = write_checkpoint(tmp_path / "model", "roberta", sharp=True)
    config = AutoConfig.for_model(
        "longformer", initializer_range=0.3, attention_window=[16, 16], pad_token_id=0, sep_token_id=3,
        max_position_embeddings=80, **{**SIZES, "vocab_size": 300},
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForQuestionAnswering.from_config(config).save_pretrained(folder)
    answerer = TorchAnswerer.load(folder)
    contexts = ["w1 w2. w3", "w1 </s> w2. </s> w3", "w4"]
    found = answerer.find([("w5 ?", context) for context in contexts])
    alone = [answerer.find([("w5 ?", context)])[0] for context in contexts]
    assert [each.spans[0].score for each in found] == pytest.approx([each.spans[0].score for each in alone], rel=1e-4)
    assert [each.spans[0].start for each in found] == [each.spans[0].start for each in alone]
    windows = [next(answerer.tokenizer.windows([9], answerer.tokenizer.context(text))) for text in contexts]
    ids = torch.tensor([windows[1].ids])
    attended = torch.zeros_like(ids)
    attended[:, :2] = 1  # <s> and the question
    plain = AutoModelForQuestionAnswering.from_pretrained(folder).eval()
    with torch.inference_mode():
        expected = plain(ids, attention_mask=torch.ones_like(ids), global_attention_mask=attended).start_logits
    ours, _ = answerer.run({"input_ids": ids.numpy(), "attention_mask": torch.ones_like(ids).numpy()})
    torch.testing.assert_close(torch.from_numpy(ours), expected)


def test_block_sparse_attention_is_refused_where_texts_are_long(tmp_path: Path) -> None:
    folder = _with_model(tmp_path / "model", "big_bird", max_position_embeddings=1024, **SIZES)
    with pytest.raises(ArtifactError, match=r"more than 704 tokens with block-sparse attention.*\n.*original_full"):
        TorchAnswerer.load(folder)
    settings = folder / "config.json"
    settings.write_text(settings.read_text().replace("block_sparse", "original_full"))
    TorchAnswerer.load(folder)
    short = _with_model(tmp_path / "short", "big_bird", max_position_embeddings=704, **SIZES)
    assert TorchAnswerer.load(short).model.config.attention_type == "original_full"


def test_a_classifier_with_three_labels_is_trained_to_answer(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model")
    config = AutoConfig.from_pretrained(folder, num_labels=3)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    loaded = load_for_training(str(folder), "question-answering", **QuestionAnswering(64, 16, 0).model_config)
    assert loaded.model.qa_outputs.out_features == 2
    assert loaded.model.config.num_labels == 2


def test_types_of_a_model_without_types_are_those_that_its_tokenizer_lists(tmp_path: Path) -> None:
    """GPT-2 takes the types of tokens as more tokens."""
    folder = _with_model(tmp_path / "model", "gpt2", vocab_size=999, n_embd=32, n_layer=2, n_head=2, n_positions=64)
    settings = folder / "tokenizer_config.json"
    for listed, typed in ((["token_type_ids"], True), ([], False)):
        names = ["input_ids", *listed, "attention_mask"]
        settings.write_text(json.dumps({**json.loads(settings.read_text()), "model_input_names": names}))
        assert TorchAnswerer.load(folder).task.token_types == typed
