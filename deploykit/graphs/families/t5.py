"""T5, mT5 and their descendants: root-mean-square norms before each block, relative position biases, no scaling.

Source: Raffel et al., "Exploring the Limits of Transfer Learning", JMLR 2020; transformers, modeling_t5.py.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from deploykit.graphs.architecture import (
    Architecture,
    DecoderLayer,
    EncoderLayer,
    FeedForward,
    Norm,
    RelativeBias,
    Weights,
)

_PARTS = ("q", "k", "v", "o")
MAX_LENGTH = 512
"""Maximum length. T5 itself has none; this is the length that it was trained with."""


def architecture(model: Any, weights: Weights) -> Architecture:
    config = model.config
    return Architecture(
        heads=config.num_heads,
        encoder_heads=config.num_heads,
        head_size=config.d_kv,
        pre_norm=True,
        encoder_scale=1.0,
        scale=1.0,
        embedding_scale=1.0,
        encoder_embedding=weights["encoder.embed_tokens.weight"],
        decoder_embedding=weights["decoder.embed_tokens.weight"],
        projection=weights["lm_head.weight"],
        encoder_layers=tuple(_encoder_layer(f"encoder.block.{i}", config, weights) for i in range(config.num_layers)),
        decoder_layers=tuple(
            _decoder_layer(f"decoder.block.{i}", config, weights) for i in range(config.num_decoder_layers)
        ),
        encoder_norm=_norm("encoder.final_layer_norm", config, weights),
        decoder_norm=_norm("decoder.final_layer_norm", config, weights),
        encoder_bias=_bias(model.encoder, "encoder", weights),
        decoder_bias=_bias(model.decoder, "decoder", weights),
        output_scale=config.d_model**-0.5 if getattr(config, "scale_decoder_outputs", False) else 1.0,
    )


def _encoder_layer(name: str, config: Any, weights: Weights) -> EncoderLayer:
    return EncoderLayer(
        weights.attention(f"{name}.layer.0.SelfAttention", _PARTS),
        _norm(f"{name}.layer.0.layer_norm", config, weights),
        _feed_forward(f"{name}.layer.1.DenseReluDense", config, weights),
        _norm(f"{name}.layer.1.layer_norm", config, weights),
    )


def _decoder_layer(name: str, config: Any, weights: Weights) -> DecoderLayer:
    return DecoderLayer(
        weights.attention(f"{name}.layer.0.SelfAttention", _PARTS),
        _norm(f"{name}.layer.0.layer_norm", config, weights),
        weights.attention(f"{name}.layer.1.EncDecAttention", _PARTS),
        _norm(f"{name}.layer.1.layer_norm", config, weights),
        _feed_forward(f"{name}.layer.2.DenseReluDense", config, weights),
        _norm(f"{name}.layer.2.layer_norm", config, weights),
    )


def _feed_forward(name: str, config: Any, weights: Weights) -> FeedForward:
    down, activation = weights.linear(f"{name}.wo"), config.dense_act_fn
    if not config.is_gated_act:
        return FeedForward(weights.linear(f"{name}.wi"), down, activation)
    return FeedForward(weights.linear(f"{name}.wi_1"), down, activation, gate=weights.linear(f"{name}.wi_0"))


def _norm(name: str, config: Any, weights: Weights) -> Norm:
    return weights.norm(name, config.layer_norm_epsilon)


def _bias(stack: Any, name: str, weights: Weights) -> RelativeBias:
    """Return the first layer's biases, which all layers use, for every distance up to ``MAX_LENGTH``."""
    attention = stack.block[0].layer[0].SelfAttention
    distances = torch.arange(-MAX_LENGTH + 1, MAX_LENGTH)
    buckets = attention._relative_position_bucket(
        distances,
        bidirectional=not attention.is_decoder,
        num_buckets=attention.relative_attention_num_buckets,
        max_distance=attention.relative_attention_max_distance,
    )
    table = weights[f"{name}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
    return RelativeBias(np.ascontiguousarray(table[buckets.numpy()].T), MAX_LENGTH - 1)
