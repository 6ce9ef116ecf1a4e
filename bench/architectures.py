"""Try each architecture that transformers has for classification or translation: train two steps, export, quantize, compare texts.

Models are tiny, with random weights. Each is either served as PyTorch answers, on every engine and in INT8, or refused
before it is trained. Writes bench/results/<date>-architectures.json, from which bench/table.py writes the docs' table.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import random
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
WORDS = tuple(f"w{i}" for i in range(200))
LABELS = ("bad", "good")
MOST_PARAMETERS = 20_000_000
_LIMIT_S = 300  # of CPU time

_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
_SIZES: Mapping[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "dim", "n_embd", "embedding_size", "word_embed_proj_dim"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 2),
    **dict.fromkeys(("encoder_layers", "decoder_layers", "num_decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("intermediate_size", "hidden_dim", "n_inner", "encoder_ffn_dim", "decoder_ffn_dim"), 64),
    **dict.fromkeys(("d_ff", "d_inner"), 64),
    **dict.fromkeys(("d_kv", "head_dim", "d_head", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), 8),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 40),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads", "mm_tokens_per_image"), 4),
    "num_key_value_heads": 2, "image_size": 32, "moe_intermediate_size": 32, "num_experts_per_tok": 2, "vocab_size": len(WORDS) + 16,
    "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "initializer_range": 0.3, "layer_types": None,
}  # fmt: skip
# Fields that a type needs in addition; ... leaves a field unchanged.
_ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
_LATENT = {"num_key_value_heads": 4}  # attention through a latent vector has no groups of heads
_OWN: Mapping[str, Mapping[str, Any]] = {
    "axk1": {**_LATENT, "n_group": 2, "topk_group": 2},
    "axk2": _LATENT,
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": dict.fromkeys(("sliding_attention", "full_attention"), _ROPE),
    },
    "deepseek_v2": _LATENT,
    "deepseek_v3": {**_LATENT, "n_group": 2, "topk_group": 2},
    "esmc": {"num_key_value_heads": 4},
    "falcon": {"head_dim": ...},
    "funnel": {"num_hidden_layers": ..., "block_sizes": [1, 1]},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gptj": {"rotary_dim": 4},
    "jamba": {"layer_types": ..., "attn_layer_period": 2, "attn_layer_offset": 1},
    "layoutlmv3": {"coordinate_size": 6, "shape_size": 4},  # four coordinates and two sizes make a hidden state
    "lilt": {"hidden_size": 48},  # six parts make a hidden state
    "luke": {"entity_vocab_size": 10},
    "minicpm3": {**_LATENT, "dim_model_base": 32},
    "mistral4": {**_LATENT, "head_dim": ...},  # which follows from the two of qk
    "perceiver": {"num_latents": 8, "d_latents": 32, "num_self_attends_per_block": 2},
    "qwen3_5_text": {"layer_types": ["linear_attention", "full_attention"]},
    "qwen3_next": {"layer_types": ["linear_attention", "full_attention"]},
    "reformer": {
        "num_hidden_layers": ...,
        "attn_layers": ["local", "lsh"],
        "axial_pos_shape": [8, 8],
        "axial_pos_embds_dim": [16, 16],
    },
    "xlnet": {"max_position_embeddings": ...},
    "zamba": {"num_hidden_layers": 3, "layer_types": ["linear_attention", "hybrid", "hybrid"]},
    "zamba2": {"layer_types": ["mamba", "hybrid"]},
}
_LEFT = ("xlnet",)  # read the last token


def write_checkpoint(model_type: str, folder: Path) -> None:
    """Write a random classifier of ``LABELS`` with two layers, and a tokenizer that knows ``WORDS``.

    Raises transformers' exception for a type that cannot be so small, and ValueError for a type that stays large.
    """
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedTokenizerFast

    sizes = _sizes_of(AutoConfig.for_model(model_type), _OWN.get(model_type, {}))
    names = dict(enumerate(LABELS))
    config = AutoConfig.for_model(model_type, **sizes, id2label=names, label2id={n: i for i, n in names.items()})
    with torch.device("meta"):
        shapes = AutoModelForSequenceClassification.from_config(config)
    if (size := sum(parameter.numel() for parameter in shapes.parameters())) > MOST_PARAMETERS:
        raise ValueError(f"has {size:,} parameters at its smallest")
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config)
    model.save_pretrained(folder)
    vocabulary = {word: i for i, word in enumerate((*_SPECIAL, *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=32,
        pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        padding_side="left" if model_type in _LEFT else "right",
    ).save_pretrained(folder)  # fmt: skip


def _sizes_of(config: Any, own: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of ``config`` that make it small, also those of the configs inside it."""
    sizes = {
        key: value
        for key, value in {**_SIZES, **own}.items()
        if value is not ... and (key in own or hasattr(config, key))
    }
    for name in config.sub_configs:
        if (part := getattr(config, name, None)) is not None:
            sizes[name] = {"model_type": part.model_type, **_sizes_of(part, _OWN.get(part.model_type, {}))}
    return sizes


def write_rows(path: Path) -> None:
    """Write 160 texts of up to 20 words, whose words determine the label."""
    draw = random.Random(0)
    lines = ["text,label"]
    for _ in range(160):
        label = draw.choice(LABELS)
        words = WORDS[:100] if label == LABELS[0] else WORDS[100:]
        lines.append(" ".join(draw.choice(words) for _ in range(draw.randint(1, 20))) + f",{label}")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def try_architecture(model_type: str, folder: Path) -> dict[str, Any]:
    """Return the result for a type: ``outcome`` is "served", "refused" (before training), "failed" or "not built".

    Needs an absolute ``folder``, which is empty. A served one has the ``engines`` that gave PyTorch's answers in fp32, and those that run it in INT8. The others have
    the ``message``.
    """
    checkpoint, rows = folder / "checkpoint", folder / "rows.csv"
    try:
        write_checkpoint(model_type, checkpoint)
    except Exception as error:
        message = f"{type(error).__name__}: {str(error).strip()}".splitlines()[0][:300]
        return {"outcome": "not built", "message": message}
    write_rows(rows)
    return _train_and_export(folder, model_type, rows, "--per-device-train-batch-size", 4)


def try_translator(model_type: str, folder: Path) -> dict[str, Any]:
    """Return the result for a type of encoder-decoder, as ``try_architecture`` does."""
    import torch
    from tiny_translators import FAMILIES, write_pairs
    from transformers import AutoConfig

    checkpoint, rows = folder / "checkpoint", folder / "rows.tsv"
    checkpoint.mkdir()
    torch.manual_seed(0)
    write, source, target = FAMILIES.get(model_type, (None, "en", "fr"))
    if write is not None:
        write(checkpoint)
    else:  # files that are checked before a checkpoint's type is refused
        AutoConfig.for_model(model_type).save_pretrained(checkpoint)
        for name in ("model.safetensors", "tokenizer.json"):
            (checkpoint / name).touch()
    write_pairs(rows, source, target)
    words = ("--task", "translation", "--source-lang", source, "--target-lang", target, "--max-length", 38)
    return _train_and_export(folder, model_type, rows, *words)


def _train_and_export(folder: Path, model_type: str, rows: Path, *options: object) -> dict[str, Any]:
    from click.testing import CliRunner

    from deploykit.artifacts import load_manifest
    from deploykit.cli import main

    checkpoint, trained, exported = (folder / name for name in ("checkpoint", "run", "export"))

    def run(*words: object) -> str:
        """Return "" or the error."""
        result = CliRunner().invoke(main, [str(word) for word in words])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            return f"traceback: {result.exception!r}"
        lines = [line.removeprefix("error: ") for line in result.stderr.splitlines() if line.startswith("error: ")]
        message = lines[-1] if lines else "no message"
        for noise in (f"{checkpoint}: ", f"models of type {model_type} ", f"{folder}/"):
            message = message.replace(noise, "")
        return message if result.exit_code else ""

    if message := run("finetune", checkpoint, "--train", rows, "--max-steps", 2, *options, "--output-dir", trained):
        began = any(folder.glob(".run.*.training/trainer/*")) or message.startswith("traceback")
        return {"outcome": "failed" if began else "refused", "message": message}
    words = ("--int8", "--calibration-rows", 16, "--max-drop", 100)
    message = run("export", trained, *words, "--output-dir", exported)
    if message.startswith("no layer can be quantized"):
        message = run("export", trained, "--output-dir", exported)
    if message:
        return {"outcome": "failed", "message": message}
    lines = load_manifest(exported, "export").metrics["accuracy_table"]
    engines = {
        precision: [line["engine"] for line in lines if line["precision"] == precision and line["engine"] != "pytorch"]
        for precision in ("fp32", "int8")
    }
    return {"outcome": "served", "engines": engines}


def architectures() -> list[str]:
    """Return the types in transformers' mapping for text classification."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

    return sorted(MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES)


def translators() -> list[str]:
    """Return the types in transformers' mapping for text to text."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES)


def _try_alone(try_type: Callable[[str, Path], dict[str, Any]], model_type: str) -> dict[str, Any]:
    """Run ``try_type`` in a separate process, which may crash."""
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        child = os.fork()
        if not child:
            resource.setrlimit(resource.RLIMIT_CPU, (_LIMIT_S, _LIMIT_S))
            sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - until the process ends
            os.dup2(sys.stdout.fileno(), 2)
            result = try_type(model_type, Path(folder))
            (Path(folder) / "result.json").write_text(json.dumps(result))
            os._exit(0)
        os.waitpid(child, 0)
        path = Path(folder) / "result.json"
        if not path.exists():
            return {"outcome": "failed", "message": "the process ended"}
        return {**json.loads(path.read_text()), "seconds": round(time.monotonic() - begun, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("types", nargs="*", help="model types (default: all)")
    parser.add_argument("--translators", action="store_true", help="of translators, not of classifiers")
    parser.add_argument("--out", type=Path, help="results; those of other types are kept")
    options = parser.parse_args()
    out = options.out or ROOT / "bench/results" / f"{datetime.date.today()}-architectures.json"
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    # Imports that every architecture needs, before processes are forked.
    import onnxruntime  # noqa: F401
    import torch
    import transformers
    from transformers import Trainer  # noqa: F401

    import deploykit.tasks.classification.export
    import deploykit.tasks.classification.training  # noqa: F401
    from deploykit.artifacts import new_file

    torch.set_num_threads(1)
    started = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    key, types, try_type = (
        ("translators", translators(), try_translator)
        if options.translators
        else ("architectures", architectures(), try_architecture)
    )
    result = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {}
    result |= {"schema": 1, "started": started, "transformers": transformers.__version__}
    found = result.get(key, {})
    for model_type in options.types or types:
        found[model_type] = _try_alone(try_type, model_type)
        print(model_type, json.dumps(found[model_type]), flush=True)
        result[key] = dict(sorted(found.items()))
        with new_file(out) as temporary:
            temporary.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
