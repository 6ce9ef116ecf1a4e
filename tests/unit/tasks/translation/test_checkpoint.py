"""Checkpoints of all families of translators trained elsewhere: fine-tuned, exported, or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_translators import FAMILIES, TEXTS, write_bart, write_mbart, write_pairs

from deploykit.artifacts import load_manifest
from deploykit.errors import ArtifactError
from deploykit.graphs.export_options import ExportOptions
from deploykit.runtime.engines import TRANSLATION_FILES
from deploykit.stages.export import export
from deploykit.tasks.translation.checkpoint import TorchTranslator
from deploykit.tasks.translation.facts import Translation
from deploykit.tasks.translation.predictor import load_translator
from deploykit.training.checkpoint import quiet


@pytest.mark.parametrize("family", ["bart", "mbart", "mt5"])
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
    write_pairs(tmp_path / "pairs.tsv", "en_XX", "fr_XX")
    given: dict[str, Any] = {"task": "translation", "train": str(tmp_path / "pairs.tsv"), "model": str(tmp_path / "m"),
                             "source_lang": "en_XX", "target_lang": "fr_XX"}  # fmt: skip
    options = make_options({**given, "max_steps": 1, "max_length": 38, "eval_steps": 1})
    done = finetune(options, tmp_path / "out", say=lambda line: None)
    assert isinstance(done.manifest.task, Translation)
    translator = TorchTranslator.load(tmp_path / "out")
    code = translator.tokenizer.lang_code_to_id["fr_XX"]
    assert translator.encode_targets(["Ouvrez"])[0][0] == code == translator.task.generation.forced_bos_token_id


def test_a_token_without_an_embedding_is_named_before_training_and_export(tmp_path: Path) -> None:
    """A served text that has it failed, and each text beside it."""
    from transformers import AutoTokenizer

    from deploykit.stages.finetune import finetune
    from deploykit.stages.finetune_options import make_options

    quiet()
    write_bart(tmp_path / "m")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "m")
    number = len(tokenizer)
    tokenizer.add_tokens(["zyx"])
    tokenizer.save_pretrained(tmp_path / "m")
    named = f"gives 'zyx' the id {number}, and the model has embeddings for ids below {number}"
    with pytest.raises(ArtifactError, match=named):
        TorchTranslator.load(tmp_path / "m", source="en", target="fr")
    write_pairs(tmp_path / "pairs.tsv", "en", "fr")
    given: dict[str, Any] = {"task": "translation", "train": str(tmp_path / "pairs.tsv"), "model": str(tmp_path / "m"),
                             "source_lang": "en", "target_lang": "fr", "max_steps": 1, "max_length": 38}  # fmt: skip
    with pytest.raises(ArtifactError, match=named):
        finetune(make_options(given), tmp_path / "out", say=lambda line: None)


def test_models_that_do_not_translate_are_refused_by_type(tmp_path: Path) -> None:
    write_bart(tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps({**config, "model_type": "pegasus"}))
    with pytest.raises(
        ArtifactError, match=r"pegasus, which does not translate\n.*marian, m2m_100, t5, mt5, bart, mbart"
    ):
        TorchTranslator.load(tmp_path / "m", source="en", target="fr")


def test_a_list_of_start_tokens_is_refused_by_name(tmp_path: Path) -> None:
    quiet()
    write_bart(tmp_path)
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "decoder_start_token_id": [2]}))
    with pytest.raises(ArtifactError, match=r"decoder_start_token_id is a list, \[2\]"):
        TorchTranslator.load(tmp_path, source="en", target="fr")


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
