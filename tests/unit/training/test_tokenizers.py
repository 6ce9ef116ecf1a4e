"""Tokenizers as transformers 4 reads them, where transformers 5 makes parts of its own."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import sentencepiece
from tiny_answerer import write_checkpoint
from tokenizers import Tokenizer, models, normalizers, processors
from transformers.convert_slow_tokenizer import import_protobuf

from deploykit.errors import ArtifactError
from deploykit.training.checkpoint import load_tokenizer


@pytest.fixture(scope="module")
def pieces() -> bytes:
    """A SentencePiece model, which normalizes full-width digits."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the quick brown fox 123 jumps"] * 9), model_writer=model, vocab_size=60,
        hard_vocab_limit=False, minloglevel=2, pad_id=0, bos_id=1, eos_id=2, unk_id=3, pad_piece="[PAD]",
        bos_piece="[CLS]", eos_piece="[SEP]", unk_piece="[UNK]",
    )  # fmt: skip
    return model.getvalue()


def _named(folder: Path, name: str) -> Path:
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": name}))
    return folder


def test_a_checkpoint_with_a_sentencepiece_model_alone_is_read(pieces: bytes, tmp_path: Path) -> None:
    """sentencepiece's own module wants a newer protobuf than Triton's client takes."""
    folder = _named(write_checkpoint(tmp_path / "model", "deberta-v2"), "DebertaV2Tokenizer")
    (folder / "tokenizer.json").unlink()
    (folder / "spm.model").write_bytes(pieces)
    assert load_tokenizer(str(folder)).tokenize("the fox")[0] != "[UNK]"


def test_sentencepieces_normalization_is_that_of_the_file(pieces: bytes, tmp_path: Path) -> None:
    folder = _named(write_checkpoint(tmp_path / "model", "deberta-v2"), "DebertaV2Tokenizer")
    load_tokenizer(str(folder))  # makes the module importable
    proto = import_protobuf().ModelProto()
    proto.ParseFromString(pieces)
    saved = Tokenizer.from_file(str(folder / "tokenizer.json"))
    saved.normalizer = normalizers.Precompiled(proto.normalizer_spec.precompiled_charsmap)
    saved.save(str(folder / "tokenizer.json"))
    loaded = load_tokenizer(str(folder))
    assert loaded("１２３").input_ids == saved.encode("１２３").ids == loaded("123").input_ids


def test_debertas_pairs_have_one_separator(tmp_path: Path) -> None:
    folder = _named(write_checkpoint(tmp_path / "model", "roberta"), "DebertaTokenizer")
    saved = Tokenizer.from_file(str(folder / "tokenizer.json"))
    saved.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B:1 </s>:1", special_tokens=[("<s>", 2), ("</s>", 3)]
    )
    saved.save(str(folder / "tokenizer.json"))
    assert load_tokenizer(str(folder))("w1", "w2").input_ids == saved.encode("w1", "w2").ids


def test_remberts_unknown_token_is_that_of_the_file(tmp_path: Path) -> None:
    folder = _named(write_checkpoint(tmp_path / "model", "albert"), "RemBertTokenizer")
    saved = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert load_tokenizer(str(folder))("\u2603").input_ids == saved.encode("\u2603").ids


def test_a_tokenizer_that_splits_at_random_is_refused(tmp_path: Path) -> None:
    """BPE-dropout: tokenizers drops merges also outside training."""
    folder = write_checkpoint(tmp_path / "model", "bert")
    saved = Tokenizer.from_file(str(folder / "tokenizer.json"))
    saved.model = models.BPE({"[UNK]": 0, "a": 1, "b": 2, "ab": 3}, [("a", "b")], unk_token="[UNK]", dropout=0.5)
    saved.save(str(folder / "tokenizer.json"))
    with pytest.raises(ArtifactError, match=r"splits the same text at random \(dropout 0.5\)"):
        load_tokenizer(str(folder))
