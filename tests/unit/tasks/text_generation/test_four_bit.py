"""QLoRA up to what needs a GPU: refusals, the settings of the weights of 4 bits, and where the adapter goes."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from language_models import random_model, tokenizer

from deploykit.errors import UsageError
from deploykit.tasks.text_generation import four_bit, sft
from deploykit.tasks.text_generation.checkpoint import checkpoint_facts
from deploykit.tasks.text_generation.encode import EncodedRow
from deploykit.tasks.text_generation.options import TextGenerationOptions
from deploykit.tasks.text_generation.training import TextGenerationStage

IDS = torch.arange(6, 60)[None]


def options(**values: Any) -> TextGenerationOptions:
    return TextGenerationOptions(**{"model": "base", "train": "rows", "lora_r": 4, "load_in_4bit": True, **values})


def test_it_needs_an_adapter_a_folder_a_gpu_and_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="--load-in-4bit trains an adapter") as found:
        options(lora_r=0).check()
    assert found.value.remedy == "add --lora-r"
    with pytest.raises(UsageError, match="does not read GGUF files"):
        options(model="m.gguf").check()
    options().check()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match="needs an NVIDIA GPU"):
        TextGenerationStage(options())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(four_bit, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="needs bitsandbytes") as found:
        TextGenerationStage(options())
    assert found.value.remedy == "pip install 'deploykit[qlora]'"


def test_weights_are_loaded_as_double_quantized_nf4(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def from_pretrained(source: str, **given: Any) -> Any:
        asked.update(given, source=source)
        return random_model("llama")

    monkeypatch.setattr(four_bit.AutoModelForCausalLM, "from_pretrained", from_pretrained)
    model = four_bit.load_four_bit("base")
    assert not any(weight.requires_grad for weight in model.parameters())
    assert asked["source"] == "base"
    assert asked["trust_remote_code"] is False
    config = asked["quantization_config"]
    assert config.quantization_method() == "nf4"
    assert config.bnb_4bit_use_double_quant
    assert config.bnb_4bit_compute_dtype in (torch.bfloat16, torch.float16)


def logits(model: Any) -> Any:
    with torch.inference_mode():
        return model.eval()(IDS).logits


def train(load: Any, monkeypatch: pytest.MonkeyPatch, work: Path) -> Any:
    monkeypatch.setattr(sft, "load_four_bit", load)
    model, own = random_model("llama"), tokenizer()
    rows = [EncodedRow(np.arange(6, 30), np.ones(24, bool))] * 4
    facts = checkpoint_facts(model.config, model.generation_config, own)
    chosen = options(max_steps=3, learning_rate=1e-2, warmup_ratio=0.0, mixed_precision="no", validation_fraction=0.0)
    return sft.train(model, rows, [], facts, chosen, work, lambda line: None)[0]


def test_the_adapter_is_merged_into_the_weights_of_full_precision(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def rounded(source: str) -> Any:
        model = random_model("llama")
        for weight in model.parameters():
            weight.data = (weight.data * 2).round() / 2
        return model

    plain = dict(random_model("llama").named_parameters())
    trained = train(rounded, monkeypatch, tmp_path)
    moved = {name: weight - plain[name] for name, weight in trained.named_parameters()}
    adapted = {name for name in moved if "_proj" in name}
    assert all(bool(moved[name].any()) == (name in adapted) for name in moved)
    assert all(torch.linalg.matrix_rank(moved[name], rtol=1e-4) <= 4 for name in adapted), "the adapter, no rounding"


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
def test_bitsandbytes_trains_beside_its_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    random_model("llama").save_pretrained(tmp_path / "base")
    trained = train(lambda source: four_bit.load_four_bit(str(tmp_path / "base")), monkeypatch, tmp_path / "work")
    assert not torch.allclose(logits(trained), logits(random_model("llama")), atol=0.1)
