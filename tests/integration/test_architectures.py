"""Architectures of transformers, tiny: served as PyTorch answers, or refused before training. See bench/architectures.py."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from deploykit.artifacts import load_manifest
from deploykit.cli import main
from deploykit.tasks.opening import open_classifier

ROOT = Path(__file__).parents[2]
ENGINES = ["openvino", "onnxruntime"]
RECORDED = sorted((ROOT / "bench" / "results").glob("*-architectures.json"))


@pytest.fixture
def architectures(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    return importlib.import_module("architectures")


@pytest.mark.parametrize("model_type", ["albert", "mbart", "distilbert", "gpt2", "modernbert", "xlnet"])
@pytest.mark.filterwarnings("ignore")
def test_an_architecture_is_trained_exported_and_answers_as_pytorch(
    architectures: Any, model_type: str, tmp_path: Path
) -> None:
    """Layers that share weights; an encoder with a decoder; one that native runs; a decoder; two kinds of attention; padding on the left."""
    found = architectures.try_architecture(model_type, tmp_path)
    assert found["outcome"] == "served", found
    int8 = found["engines"]["int8"]
    assert found["engines"]["fp32"] == [name for name in int8 if name != "native"] == ENGINES
    assert ("native" in int8) == (model_type == "distilbert")


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [("longformer", "cannot be exported"), ("convbert", "when a text is padded"), ("canine", "on a short text")],
)
@pytest.mark.filterwarnings("ignore")
def test_an_architecture_that_cannot_be_served_is_refused_before_training_and_by_export(
    architectures: Any, model_type: str, reason: str, tmp_path: Path
) -> None:
    found = architectures.try_architecture(model_type, tmp_path)
    assert found["outcome"] == "refused", found
    assert reason in found["message"]
    assert "\n" not in found["message"]
    words = ["export", f"{tmp_path}/checkpoint", "--data", f"{tmp_path}/rows.csv", "--output-dir", f"{tmp_path}/e"]
    result = CliRunner().invoke(main, words)
    assert isinstance(result.exception, SystemExit)
    assert "error: " in result.stderr
    assert "--debug" not in result.stderr  # the remedy for what nobody thought of
    assert not (tmp_path / "e").exists()


@pytest.mark.skipif(not RECORDED, reason="bench/architectures.py was not run")
def test_every_type_was_tried_and_none_failed_after_training(architectures: Any) -> None:
    recorded = json.loads(RECORDED[-1].read_text())["architectures"]
    assert sorted(recorded) == architectures.architectures()
    assert {record["outcome"] for record in recorded.values()} <= {"served", "refused", "not built"}


@pytest.mark.parametrize("model_type", ["mbart", "umt5"])
@pytest.mark.filterwarnings("ignore")
def test_an_end_token_in_a_text_changes_no_answer_beside_it(
    architectures: Any, model_type: str, tmp_path: Path
) -> None:
    """transformers shares out all end tokens of a batch among its rows."""
    architectures.write_rows(tmp_path / "rows.csv")
    architectures.write_checkpoint(model_type, tmp_path / "c")
    words = ["export", f"{tmp_path}/c", "--data", f"{tmp_path}/rows.csv", "--output-dir", f"{tmp_path}/e"]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 0, result.output
    texts = ["w1 w2 w3", "w4 [SEP] w5 [SEP] w6", "w7 [SEP] w8"]
    for folder in (tmp_path / "c", tmp_path / "e"):
        check_answers(folder, tmp_path / "c", texts)


@pytest.mark.parametrize("pad", [None, 7])
@pytest.mark.filterwarnings("ignore")
def test_a_head_that_reads_the_last_token_reads_transformers_one(
    architectures: Any, pad: int | None, tmp_path: Path
) -> None:
    """The tokenizer ends each text with its end token, and has no padding token, or another one than the config."""
    architectures.write_checkpoint("gpt2", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "pad_token_id": pad}))
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings |= {"eos_token": "[SEP]", **({"pad_token": None} if pad is None else {})}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    check_answers(tmp_path, tmp_path, ["w1 w2 w3", "w4", "w5 w6 w7 w8 w9"])


def check_answers(folder: Path, checkpoint: Path, texts: list[str]) -> None:
    """Compare scores of the model in ``folder`` with those of transformers, which reads each text alone."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModelForSequenceClassification.from_pretrained(checkpoint).eval()
    with torch.inference_mode():
        logits = [model(**tokenizer(text, return_tensors="pt", return_token_type_ids=False)).logits for text in texts]
    found = open_classifier(str(folder), url="", engine="onnxruntime", precision="fp32").scores(texts)
    np.testing.assert_allclose(found, torch.cat(logits).softmax(dim=1).numpy(), atol=1e-4)


def train_and_export(folder: Path, *options: str) -> None:
    """Train the checkpoint c in ``folder`` on its rows.csv for two steps, and export it."""
    steps = ("--max-steps", "2", "--per-device-train-batch-size", "4", *options)
    for words in (
        ("finetune", f"{folder}/c", "--train", f"{folder}/rows.csv", *steps, "--output-dir", f"{folder}/r"),
        ("export", f"{folder}/r", "--output-dir", f"{folder}/e"),
    ):
        result = CliRunner().invoke(main, words)
        assert result.exit_code == 0, (result.output, result.exception)


@pytest.mark.parametrize("model_type", ["distilbert", "roberta"])
@pytest.mark.filterwarnings("ignore")
def test_heads_of_several_layers_are_trained_with_lora(architectures: Any, model_type: str, tmp_path: Path) -> None:
    architectures.write_rows(tmp_path / "rows.csv")
    architectures.write_checkpoint(model_type, tmp_path / "c")
    config = tmp_path / "c" / "config.json"
    names = {"id2label": {"0": "ham", "1": "spam"}, "label2id": {"ham": 0, "spam": 1}}  # so that the head is made anew
    config.write_text(json.dumps({**json.loads(config.read_text()), **names}))
    train_and_export(tmp_path, "--lora-r", "2")


@pytest.mark.filterwarnings("ignore")
def test_a_decoder_without_a_pad_token_is_padded_with_its_end_token(architectures: Any, tmp_path: Path) -> None:
    architectures.write_rows(tmp_path / "rows.csv")
    architectures.write_checkpoint("gpt2", tmp_path / "c")
    for name in ("tokenizer_config.json", "config.json"):
        settings = json.loads((tmp_path / "c" / name).read_text())
        settings = {key: value for key, value in settings.items() if key not in ("pad_token", "pad_token_id")}
        (tmp_path / "c" / name).write_text(json.dumps({**settings, "eos_token": "[UNK]"}))
    train_and_export(tmp_path)
    assert load_manifest(tmp_path / "e").task.pad_token_id == 1
