"""Write ``genai_config.json``, with which onnxruntime-genai opens an export.

Source: onnxruntime-genai 0.18, ``src/config.h`` and ``src/models/model_type.h``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from deploykit.graphs.causal_architecture import CausalArchitecture
from deploykit.tasks.text_generation.facts import TextGeneration

_TYPES = {
    "gemma": "gemma", "gemma2": "gemma2", "gemma3_text": "gemma3_text", "llama": "llama", "mistral": "mistral", "phi3": "phi3",
    "qwen2": "qwen2", "qwen3": "qwen3", "smollm3": "smollm3",
}  # fmt: skip
"""Model type of transformers -> that of onnxruntime-genai. It knows no GPT-NeoX, and wants other caches for GPT-2."""


def write_genai_config(
    directory: Path, architecture: CausalArchitecture, config: Any, task: TextGeneration, graph: str
) -> None:
    """Write the file for ``graph``, an export's file, unless onnxruntime-genai has no such model type.

    ``config`` is the checkpoint's Hugging Face configuration.
    """
    kind = _TYPES.get(config.model_type)
    if kind is None:
        return
    ends = list(task.eos_token_ids)
    first = getattr(config, "bos_token_id", None)
    decoder = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": graph,
        "head_size": architecture.head_size,
        "hidden_size": int(architecture.embedding.shape[1]),
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": "attention_mask",
            "position_ids": "position_ids",
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
        "num_attention_heads": architecture.heads,
        "num_hidden_layers": len(architecture.layers),
        "num_key_value_heads": architecture.key_heads,
    }
    model = {
        "type": kind,
        "vocab_size": int(architecture.head.shape[0]),
        "context_length": task.max_length,
        "bos_token_id": ends[0] if first is None else first,
        "eos_token_id": ends,
        "pad_token_id": task.pad_token_id,
        "decoder": decoder,
    }
    search = {"do_sample": False, "max_length": task.max_length, "past_present_share_buffer": False}
    record = {"model": model, "search": search}
    (directory / "genai_config.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
