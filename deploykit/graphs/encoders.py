"""Read the weights of encoder families that deploykit's own engine runs.

The encoder is BERT's in all of them: embeddings with a norm, layers with a norm after attention and after feed-forward, and a
head that reads the first token (classifiers) or every token.

Adding a family: a line in ``FAMILIES``.

Source: Devlin et al., "BERT", NAACL 2019; transformers, modeling_bert.py, modeling_roberta.py, modeling_distilbert.py,
modeling_electra.py, modeling_mpnet.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from optimum.utils.normalized_config import NormalizedConfigManager

from deploykit.errors import ExportError
from deploykit.graphs.architecture import Array, EncoderLayer, FeedForward, Linear, Norm, RelativeBias, Weights
from deploykit.graphs.writer import activation_of
from deploykit.runtime.engines.native.weights import LARGEST_HEAD


@dataclass(frozen=True)
class TextHead:
    """A classifier's head: out(activation(dense(hidden state of the first token)))."""

    dense: Linear
    activation: str
    out: Linear


@dataclass(frozen=True)
class Encoder:
    """An encoder with a head: weights and settings.

    ``embedding`` is [vocabulary, hidden]; ``positions`` [types x length, hidden], row 0 for the first token, including whatever
    else is added to every token, for each of the ``types`` of tokens. With ``padding``, the id of the padding token, row 0 is
    for that token, anywhere in a text, and positions of other tokens count from row 1. A linear layer as ``head`` is applied to
    the hidden state of every token.
    """

    heads: int
    embedding: Array
    positions: Array
    embedding_norm: Norm
    layers: tuple[EncoderLayer, ...]
    head: TextHead | Linear
    bias: RelativeBias | None = None
    types: int = 1
    padding: int | None = None


@dataclass(frozen=True)
class _Family:
    """Names of a family's weights. ``layer`` has those of query, key, value, output and the norm after it, of feed-forward's
    two layers and the norm after them. ``dense``, ``activation`` and ``out`` are a classifier's head."""

    base: str
    dense: str
    activation: str
    out: str
    layers: str = "encoder.layer"
    layer: tuple[str, ...] = (
        "attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense",
        "attention.output.LayerNorm", "intermediate.dense", "output.dense", "output.LayerNorm",
    )  # fmt: skip
    skips_padding: bool = False  # the positions of real tokens come after the padding token's id
    relative: str | None = None


_ROBERTA = _Family("roberta", "classifier.dense", "tanh", "classifier.out_proj", skips_padding=True)
FAMILIES: Mapping[str, _Family] = {
    "bert": _Family("bert", "bert.pooler.dense", "tanh", "classifier"),
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
    "camembert": _ROBERTA,
    "electra": _Family("electra", "classifier.dense", "gelu", "classifier.out_proj"),
    "mpnet": _Family(
        "mpnet", "classifier.dense", "tanh", "classifier.out_proj", layer=(
            "attention.attn.q", "attention.attn.k", "attention.attn.v", "attention.attn.o", "attention.LayerNorm",
            "intermediate.dense", "output.dense", "output.LayerNorm",
        ), skips_padding=True, relative="encoder.relative_attention_bias.weight",
    ),
    "distilbert": _Family(
        "distilbert", "pre_classifier", "relu", "classifier", "transformer.layer", (
            "attention.q_lin", "attention.k_lin", "attention.v_lin", "attention.out_lin", "sa_layer_norm", "ffn.lin1",
            "ffn.lin2", "output_layer_norm",
        ),
    ),
}  # fmt: skip
_DISTILBERT_EPSILON = 1e-12  # its config has no field for it
_POSITION_TYPES = ("absolute", None)


def read_encoder(model: Any, *, typed: bool = False, token_head: str | None = None) -> Encoder:
    """Read ``model`` (a Hugging Face model, on the CPU); with ``typed``, with tokens of every type.

    ``token_head`` names the linear layer for every token; without it the model is a sequence classifier.
    Raises ExportError for a model that an ``Encoder`` cannot represent.
    """
    config = model.config
    if (kind := config.model_type) not in FAMILIES:
        raise ExportError(f"it runs {', '.join(FAMILIES)}, not {kind}")
    family = FAMILIES[kind]
    sizes = NormalizedConfigManager.get_normalized_config_class(kind)(config)
    state = {name: np.asarray(tensor.detach().float().numpy()) for name, tensor in model.state_dict().items()}
    weights = _Read(state)
    epsilon = getattr(config, "layer_norm_eps", _DISTILBERT_EPSILON)
    query, key, value, out, attention_norm, up, down, feed_forward_norm = family.layer
    activation = getattr(config, "hidden_act", None) or config.activation
    activation_of(activation)
    try:
        positions = weights[f"{family.base}.embeddings.position_embeddings.weight"]
        if family.skips_padding:
            positions = positions[config.pad_token_id :]
        token_types = f"{family.base}.embeddings.token_type_embeddings.weight"
        distances = positions
        types = weights[token_types][: None if typed else 1] if token_types in state else positions[:1] * 0
        positions = np.concatenate([positions + kind_of_token for kind_of_token in types])
        found = Encoder(
            heads=sizes.num_attention_heads,
            embedding=weights[f"{family.base}.embeddings.word_embeddings.weight"],
            positions=positions,
            embedding_norm=weights.norm(f"{family.base}.embeddings.LayerNorm", epsilon),
            layers=tuple(
                EncoderLayer(
                    weights.attention(f"{family.base}.{family.layers}.{i}", (query, key, value, out)),
                    weights.norm(f"{family.base}.{family.layers}.{i}.{attention_norm}", epsilon),
                    FeedForward(
                        weights.linear(f"{family.base}.{family.layers}.{i}.{up}"),
                        weights.linear(f"{family.base}.{family.layers}.{i}.{down}"),
                        activation,
                    ),
                    weights.norm(f"{family.base}.{family.layers}.{i}.{feed_forward_norm}", epsilon),
                )
                for i in range(sizes.num_layers)
            ),
            head=weights.linear(token_head)
            if token_head
            else TextHead(weights.linear(family.dense), family.activation, weights.linear(family.out)),
            bias=_relative_bias(
                getattr(model, family.base).encoder, weights[f"{family.base}.{family.relative}"], distances
            )
            if family.relative
            else None,
            types=len(types),
            padding=config.pad_token_id if family.skips_padding else None,
        )
    except KeyError as error:
        raise ExportError(f"this {kind} lacks {error.args[0]}") from error
    if unread := sorted(set(state) - weights.read):
        raise ExportError(f"this {kind} has the unknown part {unread[0]}")
    width, hidden = found.layers[0].attention.query.weight.shape[1], found.embedding.shape[1]
    if kind == "mpnet" and config.pad_token_id != 1:
        raise ExportError("this mpnet does not pad with the token 1, by which an mpnet counts positions")
    if width != hidden or width % found.heads:
        raise ExportError(f"the attention of this {kind} has another width than its hidden states")
    if width // found.heads > LARGEST_HEAD:
        raise ExportError(f"this {kind} has heads of {width // found.heads} values, more than {LARGEST_HEAD}")
    if getattr(config, "position_embedding_type", None) not in _POSITION_TYPES or getattr(config, "is_decoder", False):
        raise ExportError(f"this {kind} has another kind of attention")
    return found


class _Read(Weights):
    """It keeps the names that were ``read``."""

    def __init__(self, arrays: Mapping[str, Array]) -> None:
        super().__init__(arrays)
        self.read: set[str] = set()

    def __getitem__(self, name: str) -> Array:
        self.read.add(name)
        return super().__getitem__(name)

    def get(self, name: str) -> Array | None:
        self.read.add(name)
        return super().get(name)


def _relative_bias(encoder: Any, table: Array, positions: Array) -> RelativeBias:
    """Return MPNet's bias, which depends only on the bucket of the distance."""
    most = len(positions) - 1
    buckets = encoder.relative_position_bucket(torch.arange(-most, most + 1))
    return RelativeBias(np.ascontiguousarray(table[buckets.numpy()].T), most)
