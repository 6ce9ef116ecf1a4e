"""Checkpoints of all families of translators trained elsewhere: fine-tuned, exported, or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_translators import FAMILIES, SHAPE, TEXTS, write_bart, write_mbart, write_pairs

from deploykit.artifacts import load_manifest
from deploykit.errors import ArtifactError
from deploykit.graphs.export_options import ExportOptions
from deploykit.runtime.engines import TRANSLATION_FILES
from deploykit.stages.export import export
from deploykit.tasks.translation.checkpoint import TorchTranslator
from deploykit.tasks.translation.export_tokenizer import save_translation_tokenizer
from deploykit.tasks.translation.facts import Translation
from deploykit.tasks.translation.predictor import load_translator
from deploykit.tasks.translation.tokenizer import load_translation_tokenizer
from deploykit.training.checkpoint import quiet


def edit(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


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


@pytest.mark.parametrize("family", ["t5", "mt5"])
@pytest.mark.parametrize("prefix", ["fr: ", ""])
def test_a_prefix_in_the_config_is_put_before_sources(family: str, prefix: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    write, source, target = FAMILIES[family]
    for name in ("m", "saved"):
        (tmp_path / name).mkdir()
    write(tmp_path / "m")
    edit(tmp_path / "m" / "config.json", task_specific_params={"translation_en_to_fr": {"prefix": prefix}})
    reference = TorchTranslator.load(tmp_path / "m", source=source, target=target)
    save_translation_tokenizer(tmp_path / "m", reference.tokenizer, tmp_path / "saved")
    served = load_translation_tokenizer(tmp_path / "saved", source, target)
    texts = TEXTS[:2]
    expected = AutoTokenizer.from_pretrained(tmp_path / "m")([prefix + text for text in texts])["input_ids"]
    assert reference.encode(texts) == served.encode(texts) == expected


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


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"decoder_start_token_id": [2]}, r"decoder_start_token_id is a list, \[2\]"),
        ({"forced_eos_token_id": [2, 0]}, r"forced_eos_token_id is a list, \[2, 0\]"),
    ],
)
def test_a_list_where_one_token_is_decoded_is_refused_by_name(
    fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    quiet()
    write_bart(tmp_path)
    edit(tmp_path / "generation_config.json", **fields)
    with pytest.raises(ArtifactError, match=message):
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


@pytest.mark.parametrize("limit", [-1, 0])
def test_a_model_max_length_below_1_is_no_limit(limit: int, tmp_path: Path) -> None:
    """Every text was split into pieces of one token."""
    write_bart(tmp_path)
    edit(tmp_path / "tokenizer_config.json", model_max_length=limit)
    assert (
        TorchTranslator.load(tmp_path, source="en", target="fr").task.max_source_length
        == SHAPE["max_position_embeddings"]
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_max_length": 2}, "it reads 2 tokens, and 2 of a text are special ones or its prefix"),
        ({"eos_token": None}, "its tokenizer names no end token"),
        ({"unk_token": None}, "its tokenizer names no end token .* or no token for unknown pieces"),
    ],
)
def test_a_tokenizer_that_cannot_translate_is_refused(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    write_bart(tmp_path)
    edit(tmp_path / "tokenizer_config.json", **fields)
    with pytest.raises(ArtifactError, match=message):
        TorchTranslator.load(tmp_path, source="en", target="fr")


def test_a_model_that_counts_positions_from_the_padding_needs_its_id(tmp_path: Path) -> None:
    FAMILIES["m2m_100"][0](tmp_path)
    edit(tmp_path / "config.json", pad_token_id=None)
    with pytest.raises(ArtifactError, match="names no start, end or padding token"):
        TorchTranslator.load(tmp_path, source="en", target="fr")


def test_a_tokenizer_class_that_adds_no_language_codes_is_refused(tmp_path: Path) -> None:
    """It ignored --source-lang and --target-lang."""
    write_mbart(tmp_path)
    edit(tmp_path / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    with pytest.raises(ArtifactError, match=r"its tokenizer class, \w+, does not put the languages' codes into texts"):
        TorchTranslator.load(tmp_path, source="en_XX", target="fr_XX")


def test_a_start_without_a_position_is_refused(tmp_path: Path) -> None:
    FAMILIES["m2m_100"][0](tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    edit(tmp_path / "generation_config.json", decoder_start_token_id=config["pad_token_id"])
    with pytest.raises(ArtifactError, match="its translations start with the padding token"):
        TorchTranslator.load(tmp_path, source="en", target="fr")
