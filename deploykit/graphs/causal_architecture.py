"""Represent a decoder-only transformer as plain arrays, read from a checkpoint and written as a graph.

To add a family, write a function that returns its layers, and add it to ``FAMILIES``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from deploykit.errors import ExportError
from deploykit.graphs.architecture import Array, Attention, FeedForward, Linear, Norm

_FIXED_ROPE = ("default", "linear", "llama3", "yarn", "proportional")
"""RoPE scalings with frequencies that do not depend on the text's length."""

_HIDDEN_ACTIVATION = ("gemma2", "gemma3_text")


@dataclass(frozen=True)
class Rope:
    """Rotary positions: ``frequencies`` float32 [rotated channels / 2]; cosines and sines are multiplied by
    ``scale``."""

    frequencies: Array
    scale: float = 1.0


@dataclass(frozen=True)
class CausalLayer:
    """A layer. ``query_norm`` and ``key_norm`` apply to each head. ``window``: number of tokens, including itself, that
    a token attends to; None for all. ``parallel``: attention and feed-forward read the same hidden state.
    ``after_attention`` and ``after_feed_forward`` are norms of a block's output before it is added."""

    attention: Attention
    attention_norm: Norm
    feed_forward: FeedForward
    feed_forward_norm: Norm
    rope: Rope | None = None
    query_norm: Norm | None = None
    key_norm: Norm | None = None
    window: int | None = None
    parallel: bool = False
    after_attention: Norm | None = None
    after_feed_forward: Norm | None = None


@dataclass(frozen=True)
class CausalArchitecture:
    """A model. ``embedding`` [vocabulary, hidden], ``positions`` [length, hidden] or None; ``head`` [vocabulary,
    hidden] is the same array if tied. ``scale`` multiplies attention scores; caps limit scores and logits."""

    embedding: Array
    head: Array
    layers: Sequence[CausalLayer]
    norm: Norm
    heads: int
    key_heads: int
    head_size: int
    scale: float
    positions: Array | None = None
    head_bias: Array | None = None
    embedding_scale: float = 1.0
    attention_cap: float | None = None
    logit_cap: float | None = None


def check_supported(config: Any, name: str) -> None:
    """Raise ExportError for an unsupported model type or RoPE scaling."""
    kind = config.model_type
    if kind not in FAMILIES:
        raise ExportError(
            f"{name}: language models of type {kind!r} are not supported", f"supported types: {', '.join(FAMILIES)}"
        )
    if "sliding_attention" in (getattr(config, "layer_types", None) or ()) and not config.sliding_window:
        raise ExportError(
            f"{name}: layer_types has sliding_attention, and there is no sliding_window", "correct its config.json"
        )
    if kind == "gemma3_text" and config.use_bidirectional_attention:
        raise ExportError(
            f"{name}: each token reads the tokens after it (use_bidirectional_attention), so it writes no text",
            "give a language model; this one computes embeddings",
        )
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [p for p in parameters.values() if isinstance(p, Mapping)] or [parameters]
    for scaling in (p.get("rope_type", "default") for p in nested):
        if scaling not in _FIXED_ROPE:
            raise ExportError(
                f"{name}: RoPE scaling {scaling!r} is not supported", f"supported: {', '.join(_FIXED_ROPE)}"
            )


def read_causal_architecture(model: Any) -> CausalArchitecture:
    """Read the architecture and weights of ``model``, a Hugging Face causal language model on the CPU.

    Raises ExportError for an unsupported model.
    """
    check_supported(model.config, type(model).__name__)
    return FAMILIES[model.config.model_type](model)


def _array(tensor: Any) -> Array:
    return np.asarray(tensor.detach().float().numpy())


def _linear(module: Any) -> Linear:
    weight = _array(module.weight)
    bias = None if getattr(module, "bias", None) is None else _array(module.bias)
    # GPT-2's Conv1D stores [in, out].
    return Linear(weight if type(module).__name__ == "Conv1D" else np.ascontiguousarray(weight.T), bias)


def _cut(layer: Linear, parts: Sequence[slice | Any]) -> list[Linear]:
    """Split a merged linear layer into ``parts`` of its output channels."""
    return [
        Linear(np.ascontiguousarray(layer.weight[:, part]), None if layer.bias is None else layer.bias[part])
        for part in parts
    ]


def _slices(*sizes: int) -> list[slice]:
    ends = np.cumsum(sizes).tolist()
    return [slice(end - size, end) for size, end in zip(sizes, ends)]


def _norm(module: Any, *, plus_one: bool = False) -> Norm:
    beta = getattr(module, "bias", None)
    epsilon = next(getattr(module, name) for name in ("variance_epsilon", "eps") if hasattr(module, name))
    gamma = _array(module.weight)
    return Norm(1 + gamma if plus_one else gamma, None if beta is None else _array(beta), float(epsilon))


def _head(model: Any, embedding: Array) -> tuple[Array, Array | None]:
    head = model.get_output_embeddings()
    tied = head.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()
    return embedding if tied else _array(head.weight), None if head.bias is None else _array(head.bias)


def _rope(rotary: Any, layer_type: str | None) -> Rope:
    if hasattr(rotary, "inv_freq"):
        return Rope(_array(rotary.inv_freq), float(rotary.attention_scaling))
    frequencies = _array(getattr(rotary, f"{layer_type}_inv_freq"))
    return Rope(frequencies, float(getattr(rotary, f"{layer_type}_attention_scaling")))


def _llama_like(model: Any) -> CausalArchitecture:
    """Read Llama, and the families that differ from it only in norms, biases or the window."""
    config, body = model.config, model.model
    gemma = config.model_type.startswith("gemma")
    first = body.layers[0].self_attn
    size = int(first.head_dim)
    key_heads = int(config.num_key_value_heads)
    without_rope = {i for i, use in enumerate(getattr(config, "no_rope_layers", None) or ()) if not use}

    def norm(module: Any) -> Norm:
        return _norm(module, plus_one=gemma)

    layers = []
    for i, layer in enumerate(body.layers):
        attention, mlp = layer.self_attn, layer.mlp
        types = getattr(config, "layer_types", None)
        kind = types[i] if types else None
        slides = kind == "sliding_attention" if types else config.model_type in ("mistral", "phi3")
        if hasattr(attention, "qkv_proj"):
            sizes = _slices(config.num_attention_heads * size, key_heads * size, key_heads * size)
            query, key, value = _cut(_linear(attention.qkv_proj), sizes)
        else:
            query, key, value = (_linear(getattr(attention, f"{name}_proj")) for name in "qkv")
        if hasattr(mlp, "gate_up_proj"):
            packed = _linear(mlp.gate_up_proj)
            gate, up = _cut(packed, _slices(*[packed.weight.shape[1] // 2] * 2))
        else:
            gate, up = _linear(mlp.gate_proj), _linear(mlp.up_proj)
        # Each reads its own of the two fields; checkpoints of the first Gemma may have both.
        activation = config.hidden_activation if config.model_type in _HIDDEN_ACTIVATION else config.hidden_act
        four_norms = hasattr(layer, "pre_feedforward_layernorm")
        layers.append(
            CausalLayer(
                Attention(query, key, value, _linear(attention.o_proj)),
                norm(layer.input_layernorm),
                FeedForward(up, _linear(mlp.down_proj), activation, gate),
                norm(layer.pre_feedforward_layernorm if four_norms else layer.post_attention_layernorm),
                rope=None if i in without_rope else _rope(body.rotary_emb, kind),
                query_norm=norm(attention.q_norm) if hasattr(attention, "q_norm") else None,
                key_norm=norm(attention.k_norm) if hasattr(attention, "k_norm") else None,
                window=getattr(config, "sliding_window", None) if slides else None,
                after_attention=norm(layer.post_attention_layernorm) if four_norms else None,
                after_feed_forward=norm(layer.post_feedforward_layernorm) if four_norms else None,
            )
        )
    embedding = _array(body.embed_tokens.weight)
    head, head_bias = _head(model, embedding)
    return CausalArchitecture(
        embedding, head, layers, norm(body.norm), int(config.num_attention_heads), key_heads, size,
        float(first.scaling), head_bias=head_bias, embedding_scale=float(config.hidden_size) ** 0.5 if gemma else 1.0,
        # Gemma 3 has the field too, and does not read it.
        attention_cap=config.attn_logit_softcapping if config.model_type == "gemma2" else None,
        logit_cap=getattr(config, "final_logit_softcapping", None),
    )  # fmt: skip


def _gpt2(model: Any) -> CausalArchitecture:
    config, body = model.config, model.transformer
    hidden = int(config.n_embd)
    size = hidden // int(config.n_head)
    layers = []
    for i, layer in enumerate(body.h):
        query, key, value = _cut(_linear(layer.attn.c_attn), _slices(hidden, hidden, hidden))
        if config.scale_attn_by_inverse_layer_idx:
            query = Linear(query.weight / (i + 1), None if query.bias is None else query.bias / (i + 1))
        layers.append(
            CausalLayer(
                Attention(query, key, value, _linear(layer.attn.c_proj)),
                _norm(layer.ln_1),
                FeedForward(_linear(layer.mlp.c_fc), _linear(layer.mlp.c_proj), config.activation_function),
                _norm(layer.ln_2),
            )
        )
    embedding = _array(body.wte.weight)
    head, head_bias = _head(model, embedding)
    return CausalArchitecture(
        embedding, head, layers, _norm(body.ln_f), int(config.n_head), int(config.n_head), size,
        size**-0.5 if config.scale_attn_weights else 1.0, positions=_array(body.wpe.weight), head_bias=head_bias,
    )  # fmt: skip


def _gpt_neox(model: Any) -> CausalArchitecture:
    config, body = model.config, model.gpt_neox
    heads = int(config.num_attention_heads)
    size = int(config.hidden_size) // heads
    # Query, key and value are adjacent within each head.
    channels = np.arange(3 * config.hidden_size).reshape(heads, 3, size)
    layers = []
    for layer in body.layers:
        packed = _linear(layer.attention.query_key_value)
        query, key, value = _cut(packed, [channels[:, part].ravel() for part in range(3)])
        layers.append(
            CausalLayer(
                Attention(query, key, value, _linear(layer.attention.dense)),
                _norm(layer.input_layernorm),
                FeedForward(_linear(layer.mlp.dense_h_to_4h), _linear(layer.mlp.dense_4h_to_h), config.hidden_act),
                _norm(layer.post_attention_layernorm),
                rope=_rope(body.rotary_emb, None),
                parallel=bool(config.use_parallel_residual),
            )
        )
    embedding = _array(body.embed_in.weight)
    head, head_bias = _head(model, embedding)
    return CausalArchitecture(
        embedding, head, layers, _norm(body.final_layer_norm), heads, heads, size, size**-0.5, head_bias=head_bias
    )


FAMILIES: Mapping[str, Callable[[Any], CausalArchitecture]] = {
    "llama": _llama_like,
    "mistral": _llama_like,
    "qwen2": _llama_like,
    "qwen3": _llama_like,
    "gemma": _llama_like,
    "gemma2": _llama_like,
    "gemma3_text": _llama_like,
    "phi3": _llama_like,
    "smollm3": _llama_like,
    "gpt2": _gpt2,
    "gpt_neox": _gpt_neox,
}
"""Model type of a Hugging Face config -> function that reads the model."""
