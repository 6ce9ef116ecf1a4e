"""Tiny language models with random weights, and a tokenizer trained on a few lines, for tests."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deploykit.tasks.text_generation.encode import EncodedRow

SPECIAL = ("<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<pad>")
SIZES: dict[str, Any] = {
    "vocab_size": 400, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 256, "pad_token_id": 5, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
"""Fields of a config; GPT-2 has other names."""

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2, "rope_parameters": {
        "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64}},
    "llama yarn": {"num_key_value_heads": 2, "attention_bias": True, "tie_word_embeddings": True, "rope_parameters": {
        "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}},
    "llama linear": {"num_key_value_heads": 4, "mlp_bias": True, "rope_parameters": {
        "rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}},
    "llama narrow heads": {"num_key_value_heads": 2, "head_dim": 12},
    "mistral": {"num_key_value_heads": 2, "sliding_window": 8},
    "qwen2": {"num_key_value_heads": 2, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    "qwen3": {"num_key_value_heads": 1, "head_dim": 32},
    "gemma": {"num_key_value_heads": 1, "head_dim": 32},
    "gemma2": {"num_key_value_heads": 2, "head_dim": 32, "sliding_window": 8, "query_pre_attn_scalar": 16},
    "gemma3_text": {"num_key_value_heads": 2, "head_dim": 32, "sliding_window": 8,
                    "layer_types": ["sliding_attention", "full_attention"]},
    "phi3": {"num_key_value_heads": 2, "sliding_window": 8},
    "smollm3": {"num_key_value_heads": 2, "no_rope_layers": [1, 0]},
    "gpt2": {},
    "gpt_neox": {"rotary_pct": 0.25},
    "gpt_neox sequential": {"rotary_pct": 1.0, "use_parallel_residual": False},
}  # fmt: skip
"""Model type, and what else the variant is named for -> its own settings."""


def random_model(name: str, *, scale: float = 4.0, **settings: Any) -> Any:
    """A model of one of ``FAMILIES``, whose weights are large enough that its answers are no ties."""
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    kind = name.split()[0]
    sizes = SIZES
    if kind == "gpt2":
        sizes = {"vocab_size": 400, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256, "bos_token_id": 1,
                 "eos_token_id": 2}  # fmt: skip
    config = CONFIG_MAPPING[kind](**{**sizes, **FAMILIES[name], **settings})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for weight in model.parameters():
        if weight.dim() == 1:
            weight.data.add_(torch.randn_like(weight) * 0.2)
        else:
            weight.data.mul_(scale)
    return model


def tokenizer(template: str | None = None) -> Any:
    """A byte-level BPE tokenizer as transformers has it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    lines = [f"{row['prompt']} {row['completion']}" for row in command_rows()] + ["system user assistant \n"]
    bpe = Tokenizer(models.BPE(unk_token="<unk>"))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=390, special_tokens=list(SPECIAL), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    bpe.train_from_iterator(lines, trainer)
    found = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
    )
    found.chat_template = template
    return found


def write_checkpoint(folder: Path, name: str = "llama", template: str | None = None, **settings: Any) -> Path:
    """A whole checkpoint as Hugging Face writes it."""
    random_model(name, **settings).save_pretrained(folder)
    tokenizer(template).save_pretrained(folder)
    return folder


def write_export(
    folder: Path, name: str = "llama", template: str | None = None, *, native: bool = False, **settings: Any
) -> Path:
    """A whole export of a random model, to be served; with ``native``, also in INT8 for that engine."""
    from deploykit.artifacts import write_manifest
    from deploykit.graphs.causal_architecture import read_causal_architecture
    from deploykit.graphs.causal_decoder import build_causal_decoder
    from deploykit.graphs.causal_lm import build_causal_lm
    from deploykit.graphs.native_causal import NativeCausalWriter
    from deploykit.graphs.writer import save_with_weights_of
    from deploykit.quantization.onnx_files import save_with_weights
    from deploykit.runtime.engines import NATIVE_FILE
    from deploykit.tasks.text_generation.checkpoint import checkpoint_facts

    model, own = random_model(name, **settings), tokenizer(template)
    folder.mkdir(parents=True)
    own.save_pretrained(folder)
    architecture = read_causal_architecture(model)
    save_with_weights(build_causal_lm(architecture), folder / "model.onnx")
    save_with_weights_of(build_causal_decoder(architecture), folder / "decoder.onnx", folder / "model.onnx")
    if native:
        NativeCausalWriter(architecture).save(folder / NATIVE_FILE, 8)
    write_manifest(folder, "export", checkpoint_facts(model.config, model.generation_config, own), inputs=name)
    return folder


def command_rows() -> list[dict[str, str]]:
    """96 prompts and answers that can be learned: words of a command by words of its description."""
    deeds = {"list": "ls", "delete": "rm", "show": "cat", "copy": "cp"}
    things = {"file": "f", "folder": "d", "log": "l", "page": "p", "note": "n", "image": "i"}
    places = {"here": ".", "at home": "~", "in the root": "/", "above": ".."}
    return [
        {"prompt": f"{deed} the {thing} {place}", "completion": f"{deeds[deed]} -{things[thing]} {places[place]}"}
        for deed, thing, place in itertools.product(deeds, things, places)
    ]


def write_rows(path: Path) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in command_rows()), encoding="utf-8")
    return path


def encoded_rows(count: int, seed: int = 0) -> list[EncodedRow]:
    """Random training rows with one beginning, whose first 8 tokens are not learned."""
    import numpy as np

    from deploykit.tasks.text_generation.encode import EncodedRow

    random = np.random.default_rng(seed)
    beginning = random.integers(6, 390, 5)
    return [
        EncodedRow(np.append(beginning, random.integers(6, 390, n)), np.arange(n + 5) > 7)
        for n in random.integers(8, 20, count)
    ]
