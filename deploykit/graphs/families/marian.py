"""MarianMT (Helsinki-NLP/opus-mt-*): norms after each block, fixed sinusoidal positions, an output bias.

Source: Junczys-Dowmunt et al., "Marian", ACL 2018; transformers, modeling_marian.py.
"""

from __future__ import annotations

from typing import Any

from deploykit.graphs.architecture import Architecture, Weights
from deploykit.graphs.families import bart


def architecture(model: Any, weights: Weights) -> Architecture:
    return Architecture(
        **bart.sizes(model.config),
        pre_norm=False,
        encoder_embedding=weights["model.encoder.embed_tokens.weight"],
        decoder_embedding=weights["model.decoder.embed_tokens.weight"],
        projection=weights["lm_head.weight"],
        # Read from the model, which computes them; saved checkpoints do not contain them.
        encoder_positions=weights["model.encoder.embed_positions.weight"],
        decoder_positions=weights["model.decoder.embed_positions.weight"],
        encoder_layers=bart.encoder_layers(model.config, weights),
        decoder_layers=bart.decoder_layers(model.config, weights),
        output_bias=weights["final_logits_bias"].reshape(-1),
    )
