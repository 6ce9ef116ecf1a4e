"""Write tiny translators with random weights, of each family that deploykit translates with, as checkpoints trained elsewhere."""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

TEXTS = [f"Open the {thing} number {i}." for i in range(6) for thing in ("file", "folder", "</s> user", "café")]
SHAPE = {
    "d_model": 32, "encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48, "decoder_ffn_dim": 40, "max_position_embeddings": 40, "init_std": 0.3,
}  # fmt: skip


def unigrams() -> list[tuple[str, float]]:
    """Return words and letters of TEXTS as pieces of a SentencePiece unigram model."""
    words = sorted({word for text in TEXTS for word in text.split()})
    letters = sorted({letter for text in TEXTS for letter in text} - {" "})
    return [(f"▁{word}", -3.0) for word in words] + [("▁", -8.0)] + [(letter, -9.0) for letter in letters]


def write_bart(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import BartConfig, BartForConditionalGeneration, BartTokenizer

    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    trained.train_from_iterator(TEXTS, trainer)
    model = json.loads(trained.to_str())["model"]
    BartTokenizer(model["vocab"], [tuple(merge) for merge in model["merges"]]).save_pretrained(folder)
    config = BartConfig(vocab_size=len(model["vocab"]), activation_function="gelu", **SHAPE)
    bart = BartForConditionalGeneration(config)
    bart.generation_config.update(forced_bos_token_id=0, forced_eos_token_id=2, num_beams=2, max_length=14,
                                  early_stopping=True, no_repeat_ngram_size=3)  # fmt: skip
    bart.save_pretrained(folder)


def write_mbart(folder: Path) -> None:
    from transformers import MBart50Tokenizer, MBartConfig, MBartForConditionalGeneration

    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), *unigrams()]
    tokenizer = MBart50Tokenizer(pieces, src_lang="en_XX", tgt_lang="fr_XX")
    tokenizer.save_pretrained(folder)
    config = MBartConfig(vocab_size=len(tokenizer), activation_function="relu", scale_embedding=True,
                         decoder_start_token_id=2, pad_token_id=1, eos_token_id=2, bos_token_id=0, **SHAPE)  # fmt: skip
    model = MBartForConditionalGeneration(config)
    model.generation_config.update(max_length=12, num_beams=2)
    model.save_pretrained(folder)


def write_mt5(folder: Path) -> None:
    import torch
    from transformers import MT5Config, MT5ForConditionalGeneration

    model = _new_t5(folder, MT5Config, MT5ForConditionalGeneration)
    model.lm_head.weight = torch.nn.Parameter(0.2 * torch.randn(model.config.vocab_size, 32))
    model.save_pretrained(folder)


def write_t5(folder: Path) -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    _new_t5(folder, T5Config, T5ForConditionalGeneration).save_pretrained(folder)


def _new_t5(folder: Path, config_class: Any, model_class: Any) -> Any:
    """Return a new model, and write its tokenizer to ``folder``."""
    from transformers import T5Tokenizer

    tokenizer = T5Tokenizer([("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *unigrams()], extra_ids=0)
    tokenizer.save_pretrained(folder)
    config = config_class(vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4,
                          decoder_start_token_id=0, initializer_factor=1.5)  # fmt: skip
    model = model_class(config)
    model.generation_config.update(max_new_tokens=10, no_repeat_ngram_size=2)
    return model


def write_marian(folder: Path) -> None:
    from transformers import MarianConfig, MarianMTModel, MarianTokenizer

    spm, pieces = _sentencepiece(folder, "source.spm")
    (folder / "target.spm").write_bytes(spm)
    vocabulary = _vocabulary(folder, "</s>", "<unk>", *pieces, "<pad>")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it recommends a package that it does not use
        tokenizer = MarianTokenizer(*(str(folder / n) for n in ("source.spm", "target.spm", vocabulary)),
                                    source_lang="en", target_lang="fr")  # fmt: skip
    tokenizer.save_pretrained(folder)
    ids = {"pad_token_id": len(pieces) + 2, "decoder_start_token_id": len(pieces) + 2, "eos_token_id": 0}
    config = MarianConfig(vocab_size=len(pieces) + 3, decoder_vocab_size=len(pieces) + 3, activation_function="swish",
                          scale_embedding=True, **ids, **SHAPE)  # fmt: skip
    model = MarianMTModel(config)
    model.generation_config.update(max_length=14, num_beams=2, no_repeat_ngram_size=2)
    model.save_pretrained(folder)


def write_m2m_100(folder: Path) -> None:
    from transformers import M2M100Config, M2M100ForConditionalGeneration, M2M100Tokenizer

    _, pieces = _sentencepiece(folder, "sentencepiece.bpe.model")
    vocabulary = _vocabulary(folder, "<s>", "<pad>", "</s>", "<unk>", *pieces)
    tokenizer = M2M100Tokenizer(
        str(folder / vocabulary), str(folder / "sentencepiece.bpe.model"), src_lang="en", tgt_lang="fr"
    )
    tokenizer.save_pretrained(folder)
    size = 1 + max(len(tokenizer) - 1, *tokenizer.lang_token_to_id.values())
    model = M2M100ForConditionalGeneration(M2M100Config(vocab_size=size, decoder_start_token_id=2, **SHAPE))
    model.generation_config.update(max_length=14, num_beams=2)
    model.save_pretrained(folder)


def _sentencepiece(folder: Path, name: str) -> tuple[bytes, list[str]]:
    """Train a SentencePiece model on TEXTS and write it; return it, and its pieces without control symbols."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 4), model_writer=model, vocab_size=100, hard_vocab_limit=False, minloglevel=2,
        num_threads=1,
    )  # fmt: skip
    (folder / name).write_bytes(model.getvalue())
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    return model.getvalue(), [pieces.id_to_piece(i) for i in range(3, pieces.get_piece_size())]


def _vocabulary(folder: Path, *tokens: str) -> str:
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    return "vocab.json"


FAMILIES: Mapping[str, tuple[Callable[[Path], None], str, str]] = {
    "bart": (write_bart, "en", "fr"),
    "m2m_100": (write_m2m_100, "en", "fr"),
    "marian": (write_marian, "en", "fr"),
    "mbart": (write_mbart, "en_XX", "fr_XX"),
    "mt5": (write_mt5, "en", "fr"),
    "t5": (write_t5, "en", "fr"),
}
"""Model type -> the function that writes its checkpoint to an existing folder, its source and its target language."""


def write_pairs(path: Path, source: str, target: str) -> None:
    """Write TEXTS with made-up translations as a .tsv."""
    path.write_text(f"{source}\t{target}\n" + "".join(f"{text}\tOuvrez {text.lower()}\n" for text in TEXTS))
