"""BART and mBART (also mBART-50): learned positions from the third row on, norms of the embeddings, an output bias.

Norms are after each block in BART; in mBART they are before each block and once at the end.

Source: Lewis et al., "BART", ACL 2020; Liu et al., "Multilingual Denoising Pre-training", TACL 2020; transformers,
modeling_bart.py and modeling_mbart.py.
"""

from __future__ import annotations

from typing import Any

from deploykit.graphs.architecture import Architecture, Weights
from deploykit.graphs.families import bart

_OFFSET = 2  # row of the first position in the table


def architecture(model: Any, weights: Weights) -> Architecture:
    config = model.config
    pre_norm = config.model_type == "mbart"
    last = [weights.norm(f"model.{side}.layer_norm", bart.EPSILON) if pre_norm else None for side in bart.SIDES]
    first = [weights.norm(f"model.{side}.layernorm_embedding", bart.EPSILON) for side in bart.SIDES]
    return Architecture(
        **bart.sizes(config),
        pre_norm=pre_norm,
        encoder_embedding=weights["model.encoder.embed_tokens.weight"],
        decoder_embedding=weights["model.decoder.embed_tokens.weight"],
        projection=weights["lm_head.weight"],
        encoder_positions=weights["model.encoder.embed_positions.weight"][_OFFSET:],
        decoder_positions=weights["model.decoder.embed_positions.weight"][_OFFSET:],
        encoder_layers=bart.encoder_layers(config, weights),
        decoder_layers=bart.decoder_layers(config, weights),
        encoder_embedding_norm=first[0],
        decoder_embedding_norm=first[1],
        encoder_norm=last[0],
        decoder_norm=last[1],
        output_bias=weights["final_logits_bias"].reshape(-1),
    )
