"""Options of a run: valid combinations, options by task, and TOML files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from deploykit.errors import UsageError
from deploykit.stages.finetune_options import make_options, read_toml
from deploykit.tasks.classification.options import ClassificationOptions
from deploykit.tasks.translation.options import TranslationOptions
from deploykit.tasks.translation.presets import PRESETS
from deploykit.training.options import write_toml

PAIR = {"task": "translation", "train": "pairs.tsv", "source_lang": "en", "target_lang": "fr"}


def test_the_task_decides_which_options_there_are() -> None:
    assert isinstance(make_options({"model": "m", "train": "t.csv"}), ClassificationOptions)
    assert isinstance(make_options({**PAIR, "model": "m"}), TranslationOptions)


@pytest.mark.parametrize(
    ("given", "owner"),
    [
        ({"model": "m", "train": "t.csv", "batch_tokens": 100}, "translation"),
        ({"model": "m", "train": "t.csv", "source_lang": "en"}, "translation"),
        ({**PAIR, "model": "m", "class_weights": "balanced"}, "classification"),
        ({**PAIR, "model": "m", "text_column": ("text",)}, "classification"),
    ],
)
def test_an_option_of_the_other_task_is_refused(given: dict[str, Any], owner: str) -> None:
    with pytest.raises(UsageError, match=f"is for --task {owner}"):
        make_options(given)


@pytest.mark.parametrize(
    ("given", "model", "layers"),
    [
        ({"model": "m", "student": "layers=3"}, "m", 3),
        ({"teacher": "t", "student": "layers=3"}, "t", 3),
        ({"model": "m", "teacher": "t", "student": "layers=3"}, "m", 3),
        ({"teacher": "t", "student": "small"}, "small", 0),
    ],
)
def test_a_student_is_a_checkpoint_or_layers_of_one(given: dict[str, Any], model: str, layers: int) -> None:
    options = make_options({"train": "x.csv", **given})
    assert isinstance(options, ClassificationOptions)
    assert options.model is not None
    assert (Path(options.model).name, options.student_layers) == (model, layers)


def test_a_student_of_a_translator_may_have_a_shallower_decoder() -> None:
    options = make_options({**PAIR, "teacher": "t", "student": "layers=6,decoder=2"})
    assert isinstance(options, TranslationOptions)
    assert (options.student_layers, options.student_decoder_layers) == (6, 2)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"model": "m", "student": "other"}, "two checkpoints are given: m and --student other"),
        ({"model": "m", "student": "layers=0"}, "--student is 'layers=0'"),
        ({"model": "m", "student": "layer=3"}, "--student is 'layer=3'"),
        ({"model": "m", "student": "layers=3,decoder=1"}, "--student is for --task translation"),
        (
            {"model": "m", "student": "layers=3,decoder=1", "task": "question-answering"},
            "--student is for --task translation",
        ),
    ],
)
def test_a_student_that_is_neither_is_refused(given: dict[str, Any], named: str) -> None:
    with pytest.raises(UsageError, match=named):
        make_options({"train": "x.csv", **given})


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({}, "neither a checkpoint nor --from-config"),
        ({"model": "m", "from_config": "marian-tiny"}, "a checkpoint and --from-config are both"),
        ({"from_config": "marian-huge"}, "marian-tiny"),
        ({"model": "m", "target_lang": "en"}, "--source-lang and --target-lang are both en"),
        ({"model": "m", "source_lang": ""}, "--source-lang is missing"),
        ({"model": "m", "num_beams": 0}, "--num-beams is 0"),
        ({"model": "m", "num_beams": 10_000}, "--num-beams is 10000"),
        ({"model": "m", "vocabulary": 100}, "--vocabulary is for --from-config"),
        ({"from_config": "marian-tiny", "lora_r": 4}, "--lora-r is for a checkpoint"),
        ({"from_config": "marian-tiny", "batch_tokens": 1}, "--batch-tokens"),
        ({"model": "m", "label_smoothing_factor": 1.5}, "--label-smoothing-factor is 1.5"),
        ({"model": "m", "validation_fraction": 0, "early_stopping_patience": 2}, "--early-stopping-patience needs"),
        ({"model": "m", "train": ""}, "--train is missing"),
    ],
)
def test_senseless_options_are_refused_by_name(given: dict[str, Any], named: str) -> None:
    with pytest.raises(UsageError) as error:
        make_options({**PAIR, **given}).check()
    assert named in str(error.value)
    assert error.value.remedy


def test_a_preset_sets_defaults_and_given_options_win() -> None:
    options = make_options({**PAIR, "from_config": "marian-tiny", "learning_rate": 0.5})
    assert isinstance(options, TranslationOptions)
    assert options.vocabulary == PRESETS["marian-tiny"].training["vocabulary"]
    assert options.dropout == 0.1
    assert options.learning_rate == 0.5
    options.check()


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_has_consistent_options(name: str) -> None:
    preset = PRESETS[name]
    make_options({**PAIR, "from_config": name}).check()
    assert preset.d_model % preset.heads == 0


def test_the_largest_preset_is_opus_mt() -> None:
    base = PRESETS["marian-base"]
    assert (base.d_model, base.encoder_layers, base.decoder_layers, base.heads, base.ffn) == (512, 6, 6, 8, 2048)


@pytest.mark.parametrize(
    "given",
    [
        {"model": "m", "train": "t.csv", "text_column": ("a", "b"), "dropout": 0.2, "multi_label": True},
        {**PAIR, "from_config": "marian-small", "validation": "v.tsv", "num_beams": 4},
    ],
)
def test_a_toml_file_gives_the_same_options_back(given: dict[str, Any], tmp_path: Path) -> None:
    options = make_options(given)
    write_toml(options, tmp_path / "finetune.toml")
    read = read_toml(tmp_path / "finetune.toml")
    if "text_column" in read:
        read["text_column"] = tuple(read["text_column"])
    assert make_options(read) == options


@pytest.mark.parametrize("seed", [-5, 2**70])
def test_a_seed_that_numpy_does_not_take_is_refused(seed: int) -> None:
    with pytest.raises(UsageError, match=f"--seed is {seed}"):
        make_options({**PAIR, "model": "m", "seed": seed}).check()
