"""A run goes on from a LoRA adapter that peft saved, or says why it does not fit."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from language_models import random_model, tokenizer

from deploykit.errors import ArtifactError, DeploykitError, UsageError
from deploykit.tasks.text_generation.adapter import read_adapter, with_adapter
from deploykit.tasks.text_generation.checkpoint import checkpoint_facts
from deploykit.tasks.text_generation.encode import EncodedRow
from deploykit.tasks.text_generation.options import TextGenerationOptions
from deploykit.tasks.text_generation.sft import train

IDS = torch.arange(6, 60)[None]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of rank 4 on two layers of the tiny Llama, that changes its logits."""
    from peft import LoraConfig, get_peft_model

    folder = tmp_path_factory.mktemp("adapter")
    config = LoraConfig(
        task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft and transformers about each other's next release
        adapted = get_peft_model(random_model("llama"), config)
    adapted.save_pretrained(folder)
    with torch.inference_mode():
        torch.save(adapted.eval()(IDS).logits, folder / "logits.pt")
    return folder


def options(adapter: Path, **values: Any) -> TextGenerationOptions:
    return TextGenerationOptions(model="base", train="rows", init_adapter=str(adapter), **values)


def logits(model: Any) -> Any:
    with torch.inference_mode():
        return model.eval()(IDS).logits


def test_training_goes_on_from_the_adapter(adapter: Path, tmp_path: Path) -> None:
    expected = torch.load(adapter / "logits.pt")
    assert not torch.allclose(logits(random_model("llama")), expected, atol=0.1)
    adapted = with_adapter(random_model("llama"), options(adapter), lambda line: None)
    torch.testing.assert_close(logits(adapted), expected)
    trained = [name for name, weight in adapted.named_parameters() if weight.requires_grad]
    assert len(trained) == 2 * 2 * 2
    assert all("lora_" in name for name in trained)

    model, own = random_model("llama"), tokenizer()
    facts = checkpoint_facts(model.config, model.generation_config, own)
    rows = [EncodedRow(np.arange(6, 30), np.ones(24, bool))] * 4
    little, much = (
        train(random_model("llama"), rows, [], facts, options(
            adapter, max_steps=2, learning_rate=rate, warmup_ratio=0.0, mixed_precision="no", validation_fraction=0.0
        ), tmp_path / str(rate), lambda line: None)[0]
        for rate in (1e-12, 1e-2)
    )  # fmt: skip
    torch.testing.assert_close(logits(little), expected, atol=1e-3, rtol=1e-3)
    assert not torch.allclose(logits(much), expected, atol=0.1)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"lora_r": 8}, "--lora-r is 8, and the adapter .* has 4"),
        ({"lora_alpha": 32}, "--lora-alpha is 32, and the adapter .* has 8"),
        ({"use_dora": True}, "--use-dora is True"),
        ({"lora_target_modules": "q_proj"}, "--lora-target-modules is q_proj, and the adapter .* has q_proj,v_proj"),
    ],
)
def test_options_that_differ_from_the_adapter_are_refused(adapter: Path, given: Any, told: str) -> None:
    with pytest.raises(UsageError, match=told):
        read_adapter(options(adapter, **given))


def test_options_that_are_the_adapters_are_taken(adapter: Path) -> None:
    assert read_adapter(options(adapter, lora_r=4, lora_alpha=8, lora_target_modules="v_proj, q_proj")).r == 4


@pytest.mark.parametrize(
    ("name", "sizes", "told"),
    [
        ("llama", {"hidden_size": 32}, "size mismatch"),
        ("llama", {"num_hidden_layers": 1}, "no place, or no weights, for .*layers.1"),
        ("llama", {"num_hidden_layers": 3}, "no place, or no weights, for .*layers.2"),
        ("gpt2", {}, "not found in the base model"),
    ],
)
def test_an_adapter_of_another_base_is_refused(adapter: Path, name: str, sizes: Any, told: str) -> None:
    with pytest.raises(ArtifactError, match=f"does not fit base: (.|\n)*{told}"):
        with_adapter(random_model(name, **sizes), options(adapter), lambda line: None)


def test_a_folder_that_holds_no_lora_adapter_is_refused(adapter: Path, tmp_path: Path) -> None:
    own = json.loads((adapter / "adapter_config.json").read_text())

    def refused(told: str, config: Any) -> None:
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        with pytest.raises(DeploykitError, match=told):
            read_adapter(options(tmp_path))

    with pytest.raises(ArtifactError, match=r"has no adapter_config\.json"):
        read_adapter(options(tmp_path))
    refused("has no adapter_model.safetensors", own)
    (tmp_path / "adapter_model.safetensors").write_bytes((adapter / "adapter_model.safetensors").read_bytes())
    refused("contains whole modules", {**own, "modules_to_save": ["embed_tokens"]})
    refused("adapter of type IA3", {"peft_type": "IA3", "target_modules": ["q_proj"], "feedforward_modules": []})
