"""Create a MarianMT model to train from scratch."""

from __future__ import annotations

from typing import Any

import torch
from transformers import GenerationConfig, MarianConfig, MarianMTModel

from deploykit.tasks.translation.options import TranslationOptions
from deploykit.tasks.translation.presets import Preset

POSITIONS = 512
"""Most tokens of a text."""


def new_marian(preset: Preset, tokenizer: Any, options: TranslationOptions) -> Any:
    """Create a MarianMT model with random weights, configured like opus-mt's."""
    vocabulary, pad, eos = len(tokenizer), tokenizer.pad_token_id, tokenizer.eos_token_id
    config = MarianConfig(
        vocab_size=vocabulary,
        d_model=preset.d_model,
        encoder_layers=preset.encoder_layers,
        decoder_layers=preset.decoder_layers,
        encoder_attention_heads=preset.heads,
        decoder_attention_heads=preset.heads,
        encoder_ffn_dim=preset.ffn,
        decoder_ffn_dim=preset.ffn,
        max_position_embeddings=POSITIONS,
        activation_function="swish",
        scale_embedding=True,
        dropout=options.dropout or 0.0,
        attention_dropout=options.attention_dropout or 0.0,
        # With this scale, embeddings (once multiplied) and logits have a variance of 1.
        init_std=preset.d_model**-0.5,
        pad_token_id=pad,
        eos_token_id=eos,
        bos_token_id=eos,
        decoder_start_token_id=pad,
        forced_eos_token_id=eos,
    )
    model = MarianMTModel._from_config(config, attn_implementation="eager")
    for name, weight in model.named_parameters():
        if name.endswith(("proj.weight", "fc1.weight", "fc2.weight")):
            torch.nn.init.xavier_uniform_(weight)
    model.generation_config = GenerationConfig(
        max_length=min(2 * options.max_length, POSITIONS),
        num_beams=options.num_beams or 1,
        bad_words_ids=[[pad]],
        pad_token_id=pad,
        eos_token_id=eos,
        bos_token_id=eos,
        decoder_start_token_id=pad,
        forced_eos_token_id=eos,
    )
    return model
