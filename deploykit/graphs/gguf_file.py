"""Write a language model as GGUF, the file format of llama.cpp.

Sources: the GGUF specification (ggml, docs/gguf.md) and the ``gguf`` package, whose tables name metadata and tensors.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from deploykit.errors import ExportError, MissingDependencyError

GgufType = Literal["f16", "q8_0", "q4_0"]
GGUF_TYPES: tuple[str, ...] = get_args(GgufType)

_ARCHITECTURES: Mapping[str, str] = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""Model type of a Hugging Face configuration -> the equivalent architecture in llama.cpp."""
_PAIRED_ROPE = ("llama",)
"""Architectures in which llama.cpp rotates neighbouring channels, where transformers rotates the two halves of a head."""
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|"
_REST = "| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
_PATTERNS: Mapping[str, str] = {
    f"{_CONTRACTIONS}\\p{{N}}{{1,3}}{_REST}": "llama-bpe",
    f"{_CONTRACTIONS}\\p{{N}}{_REST}": "qwen2",
}
"""Regular expression of a pre-tokenizer -> its name in llama.cpp."""
_QWEN3_HEAD = 128
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5


def gguf_name(kind: str) -> str:
    """Return the name of the file in an export."""
    return f"model.{kind}.gguf"


def check_gguf(config: Any, name: str) -> None:
    """Raise ExportError for a model that llama.cpp would compute differently, MissingDependencyError without ``gguf``."""
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError("--gguf needs the package gguf", "pip install 'deploykit[finetune]'") from error
    kind = config.model_type
    if kind not in _ARCHITECTURES:
        raise ExportError(
            f"{name}: --gguf does not support models of type {kind!r}",
            f"supported types: {', '.join(_ARCHITECTURES)}; leave --gguf out",
        )
    window = getattr(config, "sliding_window", None)
    if window is not None and getattr(config, "use_sliding_window", True) and window < config.max_position_embeddings:
        raise ExportError(
            f"{name}: --gguf does not support a sliding window ({window} tokens): llama.cpp would attend to all tokens",
            "leave --gguf out",
        )
    scaling = (config.rope_parameters or {}).get("rope_type", "default")
    if scaling not in ("default", "linear", "llama3"):
        raise ExportError(f"{name}: --gguf does not support RoPE scaling {scaling!r}", "leave --gguf out")
    if kind in _PAIRED_ROPE and (config.attention_bias or config.mlp_bias):
        # transformers, which reads the file back, leaves them out.
        raise ExportError(f"{name}: --gguf does not support biases of {kind}'s linear layers", "leave --gguf out")
    if kind == "qwen3" and config.head_dim != _QWEN3_HEAD:
        raise ExportError(
            f"{name}: --gguf does not support heads of {config.head_dim} channels in qwen3: transformers reads {_QWEN3_HEAD}",
            "leave --gguf out",
        )
    if config.hidden_act != "silu":
        raise ExportError(f"{name}: --gguf does not support the activation {config.hidden_act!r}", "leave --gguf out")


def write_gguf(model: Any, tokenizer: Any, eos_token_ids: Sequence[int], kind: GgufType, path: Path) -> None:
    """Write ``model`` (of transformers, on the CPU) and its tokenizer, chat template included, to ``path``.

    Linear layers get the type ``kind``; with ``q4_0`` the embedding and the head get 8 bits, because the head decides
    between nearly equal tokens. Matrices whose rows are not a multiple of 32 stay in f16, vectors in f32. Raises ExportError for
    models that llama.cpp would compute differently.
    """
    import gguf

    config = model.config
    check_gguf(config, type(model).__name__)
    architecture = _ARCHITECTURES[config.model_type]
    writer = gguf.GGUFWriter(str(path), architecture)
    file_types = {"f16": "MOSTLY_F16", "q8_0": "MOSTLY_Q8_0", "q4_0": "MOSTLY_Q4_0"}
    writer.add_type("model")
    writer.add_file_type(int(gguf.LlamaFileType[file_types[kind]]))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _add_config(writer, config)
    _add_tokenizer(writer, tokenizer, eos_token_ids, int(model.get_input_embeddings().weight.shape[0]))
    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    for name, array in _tensors(model, paired=architecture in _PAIRED_ROPE):
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if target is None:
            raise ExportError(f"{name}: llama.cpp's {architecture} has no such tensor", "leave --gguf out")
        stored = _stored_type(kind, target, array)
        data = gguf.quants.quantize(array, stored) if array.ndim == 2 else array
        writer.add_tensor(target, data, raw_dtype=stored if array.ndim == 2 else None)
    factors = _rope_factors(model)
    if factors is not None:
        writer.add_tensor("rope_freqs.weight", factors)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_config(writer: Any, config: Any) -> None:
    import gguf

    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_size)
    writer.add_value_length(head_size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(head_size)
    writer.add_vocab_size(config.vocab_size)
    rope = config.rope_parameters or {}
    writer.add_rope_freq_base(rope.get("rope_theta", 10000.0))
    if rope.get("rope_type") == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])


def _add_tokenizer(writer: Any, tokenizer: Any, eos_token_ids: Sequence[int], rows: int) -> None:
    record = json.loads(tokenizer.backend_tokenizer.to_str())
    ids = {i: token for token, i in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    tokens, types = [], []
    for i in range(rows):
        tokens.append(ids.get(i, f"[PAD{i}]"))
        if i in added:
            types.append(_CONTROL if added[i].special else _USER_DEFINED)
        else:
            types.append(_NORMAL if i in ids else _UNUSED)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer_name(record))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    merges = record["model"]["merges"]
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in merges])
    writer.add_eos_token_id(eos_token_ids[0])
    if len(eos_token_ids) > 1:
        writer.add_eot_token_id(eos_token_ids[-1])
    for name in ("bos", "unk", "pad"):
        token = getattr(tokenizer, f"{name}_token_id")
        if token is not None:
            getattr(writer, f"add_{name}_token_id")(token)
    plain = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(tokenizer.bos_token_id is not None and plain[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(False)
    if tokenizer.chat_template is not None:
        writer.add_chat_template(tokenizer.chat_template)


def pre_tokenizer_name(record: Mapping[str, Any]) -> str:
    """Return llama.cpp's name of a tokenizer.json's pre-tokenizer.

    Raises ExportError for one that llama.cpp does not have.
    """
    steps = record["pre_tokenizer"] or {}
    steps = steps["pretokenizers"] if steps.get("type") == "Sequence" else [steps]
    kinds = [step.get("type") for step in steps]
    normalizer = (record["normalizer"] or {}).get("type")
    if record["model"]["type"] == "BPE" and normalizer in (None, "NFC") and kinds and kinds[-1] == "ByteLevel":
        byte_level = steps[-1]
        if not byte_level["add_prefix_space"]:
            if kinds == ["ByteLevel"] and byte_level["use_regex"]:
                return "gpt-2"
            if kinds == ["Digits", "ByteLevel"] and byte_level["use_regex"] and steps[0]["individual_digits"]:
                return "smollm"
            if kinds == ["Split", "ByteLevel"] and not byte_level["use_regex"]:
                name = _PATTERNS.get(steps[0]["pattern"].get("Regex", ""))
                if name is not None:
                    return name
    told = " and ".join(str(kind) for kind in kinds)
    raise ExportError(
        f"--gguf does not support this tokenizer ({record['model']['type']}, pre-tokenizer {told})",
        "supported: byte-level BPE as GPT-2, SmolLM, Llama 3 and Qwen 2 have it; leave --gguf out",
    )


def _tensors(model: Any, *, paired: bool) -> list[tuple[str, NDArray[np.float32]]]:
    """Return the weights by transformers' names, without a tied head: llama.cpp then uses the embedding."""
    config = model.config
    found = []
    tied = model.get_output_embeddings().weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()
    for name, tensor in model.state_dict().items():
        if tied and name.startswith("lm_head."):
            continue
        array = tensor.detach().float().numpy()
        for part, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if paired and f".{part}." in name:
                array = _interleaved(array, heads)
        found.append((name, np.ascontiguousarray(array)))
    return found


def _interleaved(array: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Return the output channels of each head in the order first half and second half in turn."""
    parts = array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:])
    return parts.swapaxes(1, 2).reshape(array.shape)


def _stored_type(kind: GgufType, target: str, array: NDArray[np.float32]) -> Any:
    import gguf

    types = gguf.GGMLQuantizationType
    if array.ndim == 1:
        return types.F32
    if kind == "f16" or array.shape[1] % 32:
        return types.F16
    if kind == "q4_0" and not target.startswith(("token_embd.", "output.")):
        return types.Q4_0
    return types.Q8_0


def _rope_factors(model: Any) -> NDArray[np.float32] | None:
    """Return what llama.cpp divides the frequencies by, float32 [half of a head], for Llama 3's scaling."""
    rope = model.config.rope_parameters or {}
    if rope.get("rope_type") != "llama3":
        return None
    scaled = model.model.rotary_emb.inv_freq.detach().float().numpy()
    size = 2 * len(scaled)
    plain = rope["rope_theta"] ** -(np.arange(0, size, 2, dtype=np.float64) / size)
    factors: NDArray[np.float32] = (plain / scaled).astype(np.float32)
    return factors
