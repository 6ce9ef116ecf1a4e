"""GGUF files: what transformers reads from them is what was written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from language_models import random_model, tokenizer

from deploykit.errors import ArtifactError, ExportError
from deploykit.graphs.gguf_file import GGUF_TYPES, check_gguf, pre_tokenizer_name, write_gguf
from deploykit.tasks.text_generation.chat_template import CHATML
from deploykit.tasks.text_generation.checkpoint import TorchGenerator, load_base_config
from deploykit.tasks.text_generation.export import reopened_gguf

IDS = torch.arange(6, 60)[None]


@pytest.mark.parametrize("kind", GGUF_TYPES)
def test_transformers_reads_the_same_model(kind: str, tmp_path: Path) -> None:
    model, own = random_model("llama linear", mlp_bias=False, tie_word_embeddings=True), tokenizer(CHATML)
    path = tmp_path / "model.gguf"
    write_gguf(model, own, (2, 4), kind, path)  # type: ignore[arg-type]
    again = reopened_gguf(path, model)
    with torch.inference_mode():
        expected, found = model(IDS).logits, again.torch_model(IDS).logits
    difference = float((found - expected).abs().max() / expected.abs().max())
    assert difference < {"f16": 2e-3, "q8_0": 0.05, "q4_0": 0.6}[kind]
    assert again.hf_tokenizer.chat_template == CHATML
    assert again.task.eos_token_ids == (2, 4)
    text = "<|im_start|>user\nlist 12 files<|im_end|>"
    assert again.hf_tokenizer.encode(text) == own.encode(text)


def test_llama_3s_rope_scaling_is_written_as_factors(tmp_path: Path) -> None:
    import gguf

    model = random_model("llama")
    path = tmp_path / "model.gguf"
    write_gguf(model, tokenizer(CHATML), (2, 4), "f16", path)
    [factors] = [t.data for t in gguf.GGUFReader(path).tensors if t.name == "rope_freqs.weight"]
    size = model.config.head_dim
    plain = 10000.0 ** -(np.arange(0, size, 2) / size)
    np.testing.assert_allclose(plain / factors, model.model.rotary_emb.inv_freq.numpy(), rtol=1e-5)
    assert factors.min() == pytest.approx(1, rel=1e-5)
    assert factors.max() == pytest.approx(8, rel=1e-5)


@pytest.mark.parametrize("name", ["llama", "llama linear"])
def test_a_file_whose_rope_scaling_would_be_lost_is_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    settings = {"mlp_bias": False, "tie_word_embeddings": True} if name == "llama linear" else {}
    write_gguf(random_model(name, **settings), tokenizer(CHATML), (2, 4), "f16", path)
    for refused in (TorchGenerator.load, lambda file: load_base_config(str(file))):
        with pytest.raises(ArtifactError, match="RoPE scaling, which is not read from GGUF"):
            refused(path)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("gemma2", "models of type 'gemma2'"),
        ("gpt2", "models of type 'gpt2'"),
        ("mistral", "a sliding window"),
        ("llama yarn", "RoPE scaling 'yarn'"),
        ("llama linear", "biases"),
        ("qwen3", "heads of 32 channels"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(name: str, told: str) -> None:
    with pytest.raises(ExportError, match=told):
        check_gguf(random_model(name).config, "x")


def test_a_pre_tokenizer_has_llama_cpps_name_or_is_refused() -> None:
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    record = {"pre_tokenizer": byte_level, "normalizer": None, "model": {"type": "BPE"}}
    assert pre_tokenizer_name(record) == "gpt-2"
    digits = {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level]}
    assert pre_tokenizer_name({**record, "pre_tokenizer": digits}) == "smollm"
    for other in (
        {"pre_tokenizer": {"type": "Metaspace"}},
        {"normalizer": {"type": "Lowercase"}},
        {"model": {"type": "Unigram"}},
    ):
        with pytest.raises(ExportError, match="does not support this tokenizer"):
            pre_tokenizer_name({**record, **other})
