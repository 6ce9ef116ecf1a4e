"""Checkpoints of all families of translators trained elsewhere: fine-tuned, exported, or refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from deploykit.artifacts import load_manifest
from deploykit.errors import ArtifactError
from deploykit.graphs.export_options import ExportOptions
from deploykit.runtime.engines import TRANSLATION_FILES
from deploykit.stages.export import export
from deploykit.tasks.translation.checkpoint import TorchTranslator
from deploykit.tasks.translation.facts import Translation
from deploykit.tasks.translation.predictor import load_translator
from deploykit.training.checkpoint import quiet

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
    from transformers import MT5Config, MT5ForConditionalGeneration, T5Tokenizer

    tokenizer = T5Tokenizer([("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *unigrams()], extra_ids=0)
    tokenizer.save_pretrained(folder)
    config = MT5Config(vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4,
                       decoder_start_token_id=0, initializer_factor=1.5)  # fmt: skip
    model = MT5ForConditionalGeneration(config)
    model.lm_head.weight = torch.nn.Parameter(0.2 * torch.randn(len(tokenizer), 32))
    model.generation_config.update(max_new_tokens=10, no_repeat_ngram_size=2)
    model.save_pretrained(folder)


FAMILIES: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "bart": (write_bart, "en", "fr"),
    "mbart": (write_mbart, "en_XX", "fr_XX"),
    "mt5": (write_mt5, "en", "fr"),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_foreign_checkpoint_is_exported_and_answers_as_pytorch(family: str, tmp_path: Path) -> None:
    quiet()
    torch.manual_seed(0)
    write, source, target = FAMILIES[family]
    write(tmp_path / "m")
    rows = [{"source": text, "target": f"Ouvrez {text.lower()}"} for text in TEXTS]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ExportOptions(data=str(tmp_path / "rows.jsonl"), source_lang=source, target_lang=target)
    done = export(tmp_path / "m", tmp_path / "e", options, say=lambda line: None)
    task = load_manifest(tmp_path / "e").task
    assert done.manifest.task == task
    assert isinstance(task, Translation)
    assert (task.family, task.source, task.target) == (family, source, target)
    reference = TorchTranslator.load(tmp_path / "m", source=source, target=target)
    served = load_translator(tmp_path / "e", task, TRANSLATION_FILES["fp32"], 1)
    texts = [*TEXTS[:6], "", "Open. The file!", "unbekannt 日本"]
    ours, theirs = served.translate(texts), reference.translate(texts)
    assert [(t.text, t.target_tokens) for t in ours] == [(t.text, t.target_tokens) for t in theirs]
    assert [t.score for t in ours] == pytest.approx([t.score for t in theirs], abs=1e-3)


def test_a_foreign_checkpoint_is_trained_on(tmp_path: Path) -> None:
    from deploykit.stages.finetune import finetune
    from deploykit.stages.finetune_options import make_options

    quiet()
    write_mbart(tmp_path / "m")
    rows = "".join(f"{text}\tOuvrez {text.lower()}\n" for text in TEXTS)
    (tmp_path / "pairs.tsv").write_text("en_XX\tfr_XX\n" + rows)
    given: dict[str, Any] = {"task": "translation", "train": str(tmp_path / "pairs.tsv"), "model": str(tmp_path / "m"),
                             "source_lang": "en_XX", "target_lang": "fr_XX"}  # fmt: skip
    options = make_options({**given, "max_steps": 1, "max_length": 38, "eval_steps": 1})
    done = finetune(options, tmp_path / "out", say=lambda line: None)
    assert isinstance(done.manifest.task, Translation)
    translator = TorchTranslator.load(tmp_path / "out")
    code = translator.tokenizer.lang_code_to_id["fr_XX"]
    assert translator.encode_targets(["Ouvrez"])[0][0] == code == translator.task.generation.forced_bos_token_id


def test_models_that_do_not_translate_are_refused_by_type(tmp_path: Path) -> None:
    write_bart(tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps({**config, "model_type": "pegasus"}))
    with pytest.raises(
        ArtifactError, match=r"pegasus, which does not translate\n.*marian, m2m_100, t5, mt5, bart, mbart"
    ):
        TorchTranslator.load(tmp_path / "m", source="en", target="fr")


@pytest.mark.parametrize("side", ["encoder", "decoder"])
def test_a_model_without_layers_is_refused_before_any_work(side: str, tmp_path: Path) -> None:
    from transformers import BartConfig, BartForConditionalGeneration

    write_bart(tmp_path / "m")
    config = BartConfig.from_pretrained(tmp_path / "m", **{f"{side}_layers": 0})
    BartForConditionalGeneration(config).save_pretrained(tmp_path / "m")
    with pytest.raises(ArtifactError, match=f"its {side} has no layers"):
        TorchTranslator.load(tmp_path / "m", source="en", target="fr")


def test_an_mbart_of_25_languages_is_refused_by_name(tmp_path: Path) -> None:
    write_mbart(tmp_path / "m")
    path = tmp_path / "m" / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "tokenizer_class": "MBartTokenizer"}))
    with pytest.raises(ArtifactError, match="mBART of 25 languages"):
        TorchTranslator.load(tmp_path / "m", source="en_XX", target="fr_XX")
