"""M2M100 and NLLB: norms before each block, sinusoidal positions counted from the padding id.

Source: Fan et al., "Beyond English-Centric Multilingual Machine Translation", JMLR 2021;
transformers, modeling_m2m_100.py.
"""

from __future__ import annotations

from typing import Any

from deploykit.graphs.architecture import Architecture, Weights
from deploykit.graphs.families import bart


def architecture(model: Any, weights: Weights) -> Architecture:
    config = model.config
    table = model.model.encoder.embed_positions.weights.float().numpy()
    positions = table[config.pad_token_id + 1 :]
    return Architecture(
        **bart.sizes(config),
        pre_norm=True,
        encoder_embedding=weights["model.encoder.embed_tokens.weight"],
        decoder_embedding=weights["model.decoder.embed_tokens.weight"],
        projection=weights["lm_head.weight"],
        encoder_positions=positions,
        decoder_positions=positions,
        encoder_layers=bart.encoder_layers(config, weights),
        decoder_layers=bart.decoder_layers(config, weights),
        encoder_norm=weights.norm("model.encoder.layer_norm", bart.EPSILON),
        decoder_norm=weights.norm("model.decoder.layer_norm", bart.EPSILON),
    )
