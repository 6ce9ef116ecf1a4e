"""Layer names and order common to the descendants of BART.

Source: Lewis et al., "BART", ACL 2020; transformers, modeling_bart.py.
"""

from __future__ import annotations

import math
from typing import Any

from deploykit.graphs.architecture import DecoderLayer, EncoderLayer, FeedForward, Weights

_PARTS = ("q_proj", "k_proj", "v_proj", "out_proj")
SIDES = ("encoder", "decoder")
EPSILON = 1e-5  # PyTorch's default: these families' configs have no field for it


def encoder_layers(config: Any, weights: Weights) -> tuple[EncoderLayer, ...]:
    return tuple(_encoder_layer(f"model.encoder.layers.{i}", config, weights) for i in range(config.encoder_layers))


def decoder_layers(config: Any, weights: Weights) -> tuple[DecoderLayer, ...]:
    return tuple(_decoder_layer(f"model.decoder.layers.{i}", config, weights) for i in range(config.decoder_layers))


def sizes(config: Any) -> dict[str, Any]:
    """Return the fields of an Architecture that have the same names in these families' configs."""
    # optimum's NormalizedConfigManager reports only the encoder's heads and layers of an encoder-decoder; the decoder's
    # differ in distilled checkpoints. So this file and T5's read the config itself.
    head_size = config.d_model // config.decoder_attention_heads
    return {
        "encoder_heads": config.encoder_attention_heads,
        "heads": config.decoder_attention_heads,
        "head_size": head_size,
        "encoder_scale": (config.d_model // config.encoder_attention_heads) ** -0.5,
        "scale": head_size**-0.5,
        "embedding_scale": math.sqrt(config.d_model) if config.scale_embedding else 1.0,
    }


def _encoder_layer(name: str, config: Any, weights: Weights) -> EncoderLayer:
    return EncoderLayer(
        weights.attention(f"{name}.self_attn", _PARTS),
        weights.norm(f"{name}.self_attn_layer_norm", EPSILON),
        _feed_forward(name, config, weights),
        weights.norm(f"{name}.final_layer_norm", EPSILON),
    )


def _decoder_layer(name: str, config: Any, weights: Weights) -> DecoderLayer:
    return DecoderLayer(
        weights.attention(f"{name}.self_attn", _PARTS),
        weights.norm(f"{name}.self_attn_layer_norm", EPSILON),
        weights.attention(f"{name}.encoder_attn", _PARTS),
        weights.norm(f"{name}.encoder_attn_layer_norm", EPSILON),
        _feed_forward(name, config, weights),
        weights.norm(f"{name}.final_layer_norm", EPSILON),
    )


def _feed_forward(name: str, config: Any, weights: Weights) -> FeedForward:
    return FeedForward(weights.linear(f"{name}.fc1"), weights.linear(f"{name}.fc2"), config.activation_function)
