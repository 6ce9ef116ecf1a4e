"""Load Hugging Face checkpoints safely."""

from __future__ import annotations

import importlib
import inspect
import json
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import transformers
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoTokenizer

from deploykit.artifacts import MANIFEST, load_manifest
from deploykit.errors import ArtifactError, MissingDependencyError, first_line
from deploykit.tasks.registry import DEFAULT, get_task
from deploykit.training.source import ADAPTER, check_family, check_source, read_json
from deploykit.training.weights import Loaded, load_reported, saved_keys, shown_keys

_DEFAULT_MAX_LENGTH = 512
_JSON_FILES = ("*config.json", "tokenizer.json", "special_tokens_map.json", "*.index.json")
_CHARSMAP = "precompiled_charsmap"
_POSITIONS_AFTER_PADDING = frozenset((
    "camembert", "data2vec-text", "esm", "ibert", "layoutlmv3", "lilt", "longformer", "luke", "markuplm", "roberta",
    "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod",
))  # fmt: skip


def quiet() -> None:
    """Let transformers report errors only: deploykit reports everything else that matters."""
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("torch").setLevel(logging.ERROR)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")


def load_tokenizer(model: str, *, fast: bool = True) -> Any:
    """Return the checkpoint's tokenizer. Raises ArtifactError when there is none, or with ``fast`` no tokenizer.json."""
    check_source(model)
    _read_sentencepiece_models()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Marian's recommends a package that it then makes no use of
            tokenizer = AutoTokenizer.from_pretrained(model, use_fast=True, trust_remote_code=False)
    except Exception as error:  # transformers raises whatever its dozen loaders raise
        raise not_loadable(model, error) from error
    if fast and not getattr(tokenizer, "is_fast", False):
        raise ArtifactError(
            f"{model}: its tokenizer has no fast version, which serving needs", "convert it to a tokenizer.json"
        )
    if not isinstance(tokenizer.model_max_length, int | float):
        raise ArtifactError(
            f"{model}: its model_max_length is {tokenizer.model_max_length!r}, which is not a number",
            "correct it in tokenizer_config.json",
        )
    if getattr(tokenizer, "split_special_tokens", False):
        raise ArtifactError(
            f"{model}: its tokenizer reads special tokens in texts as plain text (split_special_tokens), which is not served",
            "set split_special_tokens to false in tokenizer_config.json",
        )
    if fast:
        if dropout := getattr(tokenizer.backend_tokenizer.model, "dropout", None):
            raise ArtifactError(
                f"{model}: its tokenizer splits the same text at random (dropout {dropout:.3g}), so its answers change from call to call",
                'set "dropout" to null in tokenizer.json',
            )
        _restore(tokenizer, Path(model) / "tokenizer.json")
    return tokenizer


def _read_sentencepiece_models() -> None:
    """Let transformers read SentencePiece models by its own copy of their format where sentencepiece's does not load.

    sentencepiece 0.2.3's wants protobuf 7, which Triton's client does not take.
    """
    try:
        importlib.import_module("sentencepiece.sentencepiece_model_pb2")
    except ImportError:
        return
    except Exception:  # protobuf's own VersionError
        own = importlib.import_module("transformers.utils.sentencepiece_model_pb2_new")
        sys.modules["sentencepiece.sentencepiece_model_pb2"] = own


def _restore(tokenizer: Any, file: Path) -> None:
    """Give the tokenizer those parts of its ``file`` in place of which transformers 5, other than 4, makes its own.

    These are SentencePiece's normalization (of DeBERTa-v2 and BigBird), the separator of a pair, which is one token of
    DeBERTa, not two, and RemBERT's token for what its vocabulary lacks.
    """
    if not file.is_file():
        return
    saved, used = Tokenizer.from_file(str(file)), tokenizer.backend_tokenizer
    if _CHARSMAP in str(saved.normalizer) and _CHARSMAP not in str(used.normalizer):
        used.normalizer = saved.normalizer
    if type(tokenizer).__name__ == "DebertaTokenizer":
        used.post_processor = saved.post_processor
    if type(tokenizer).__name__ == "RemBertTokenizer":
        used.model = saved.model


def load_config(model: str, **config: Any) -> Any:
    """Return a checkpoint's configuration, with fields replaced by ``config``.

    Raises ArtifactError if it has none, or if its weights are quantized.
    """
    try:
        # Exports and comparisons read outputs by name, whatever form the checkpoint's config asks for.
        found = AutoConfig.from_pretrained(model, trust_remote_code=False, return_dict=True, **config)
    except Exception as error:  # transformers raises whatever its loaders raise
        raise not_loadable(model, error) from error
    if quantized := getattr(found, "quantization_config", None):
        method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized
        raise ArtifactError(
            f"{model}: its weights are quantized (quantization_config in config.json: {method})",
            "give the checkpoint that it was made from; or, if its weights are plain, take quantization_config out",
        )
    return found


def load_model(model: str, task: str = DEFAULT, **config: Any) -> Any:
    """Return the trained model of a checkpoint in fp32, in eval mode; ``config`` overrides its configuration.

    A LoRA adapter saved by ``finetune`` is merged into the weights it was trained on. Raises ArtifactError when a weight
    would be random: see ``load_reported``.
    """
    return _load(model, task, config, new_head=False).model


def load_for_training(model: str, task: str = DEFAULT, **config: Any) -> Loaded:
    """Load as ``load_model`` does, but allow a new head; also returns the new keys."""
    return _load(model, task, config, new_head=True)


def _load(model: str, task: str, config: dict[str, Any], *, new_head: bool) -> Loaded:
    check_source(model, task)
    adapter = Path(model) / ADAPTER
    try:
        if adapter.is_file():
            return Loaded(_load_merged(Path(model), json.loads(adapter.read_text())))
        settings = load_config(model, **config)
        check_family(model, settings.model_type, task)
        _attend_fully(settings, model, trains=new_head)
        return load_reported(get_task(task).auto_model, model, settings, new_head=new_head)
    except ArtifactError:
        raise
    except Exception as error:  # transformers raises whatever its dozen loaders raise
        raise not_loadable(model, error) from error


def _attend_fully(config: Any, model: str, *, trains: bool) -> None:
    """Replace the block-sparse attention of BigBird by full attention.

    transformers computes long texts with block-sparse attention until the model reads a short one, and with full attention
    from then on. Raises ArtifactError for a model trained elsewhere that reads long texts, unless it ``trains`` now.
    """
    if getattr(config, "attention_type", None) != "block_sparse":
        return
    short = (5 + 2 * config.num_random_blocks) * config.block_size
    if config.max_position_embeddings > short and not trains and not (Path(model) / MANIFEST).exists():
        raise ArtifactError(
            f"{model}: computes texts of more than {short} tokens with block-sparse attention, which is not served",
            'write "attention_type": "original_full" into config.json, and measure its accuracy on long texts',
        )
    config.attention_type = "original_full"


def max_tokens(tokenizer: Any, config: Any) -> int:
    """Return the longest input, in tokens, that both the tokenizer and the position embeddings allow."""
    limits = []
    if 0 < tokenizer.model_max_length < 1_000_000:  # "no limit" is written as a huge number
        limits.append(tokenizer.model_max_length)
    config = config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None) or getattr(config, "max_seq_len", None)  # MPT's
    if positions and positions > 0:  # XLNet writes -1 for no limit
        limits.append(positions - _positions_before_text(config))
    return int(min(limits, default=_DEFAULT_MAX_LENGTH))


def _positions_before_text(config: Any) -> int:
    """Return the number of unused rows of the table of positions: RoBERTa and its descendants count from the padding id."""
    if config.model_type == "mpnet":
        return 2  # whatever its padding id
    return int(config.pad_token_id) + 1 if config.model_type in _POSITIONS_AFTER_PADDING else 0


def pad_token_id(tokenizer: Any) -> int:
    return int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0)


def pad_token_id_of(tokenizer: Any, config: Any) -> int:
    """Return the id that pads the texts of a trained model, whose head may read the last token that is no padding.

    That is its config's. Where there is none, the head reads a text's last token, and the id is one that ends no text.
    """
    own = getattr(config.get_text_config(), "pad_token_id", None)
    if own is not None and own >= 0:
        return int(own)
    last = tokenizer("a")["input_ids"][-1:]
    named = (tokenizer.unk_token_id, tokenizer.bos_token_id, 0, 1)
    return next(int(i) for i in (pad_token_id(tokenizer), *named) if i is not None and i not in last)


def trained_with_token_types(tokenizer: Any, model: Any) -> bool:
    """Return whether ``model`` takes the types of the tokenizer's tokens, and was trained with them.

    A model without types of its own (GPT-2) takes tokens as types; it was trained with them if its tokenizer lists them.

    transformers 5 leaves the types of some tokenizers (ALBERT's, for example) out unless it is asked for them, transformers 4
    does not: only a list in the tokenizer's own settings counts. BigBird's are left out by both.
    """
    config = model.config
    kinds = getattr(config, "type_vocab_size", None)
    listed = tokenizer.init_kwargs.get("model_input_names", [] if kinds is None else ["token_type_ids"])
    return (
        "token_type_ids" in listed
        and config.model_type != "big_bird"
        and (kinds is None or int(kinds) > 1)
        and "token_type_ids" in inspect.signature(model.forward).parameters
    )


def check_vocabulary(model: Any, tokenizer: Any, origin: str, *, but: str | None = None) -> None:
    """Raise ArtifactError for a token, other than ``but``, that has no embedding."""
    try:
        known = getattr(model.get_input_embeddings(), "num_embeddings", None)
    except NotImplementedError:  # CANINE computes embeddings from the characters' numbers
        return
    beyond = sorted(
        (number, token) for token, number in tokenizer.get_vocab().items() if known and number >= known and token != but
    )
    if beyond:
        number, token = beyond[0]
        raise ArtifactError(
            f"{origin}: its tokenizer gives {token!r} the id {number}, and the model has embeddings for ids below {known}"
            + (f"; {len(beyond) - 1:,} more tokens have none" if len(beyond) > 1 else ""),
            "use the tokenizer that belongs to the model, or save the model after resize_token_embeddings",
        )


def not_loadable(model: str, error: Exception) -> ArtifactError:
    """Return an error with a remedy for one that transformers raised over ``model``. Raises ArtifactError for a damaged file."""
    reason = first_line(error)
    if not Path(model).exists():
        return ArtifactError(
            f"{model}: is not a local folder, and could not be fetched from the hub: {reason}",
            "check the name and the network, or give the folder of a checkpoint",
        )
    for path in sorted(path for name in _JSON_FILES for path in Path(model).glob(name) if path.is_file()):
        read_json(path)
    return ArtifactError(
        f"{model}: cannot be loaded: {reason}", "correct what the message names, or copy the checkpoint again"
    )


def _load_merged(path: Path, adapter: dict[str, Any]) -> Any:
    try:
        from peft import PeftModel
    except ImportError as error:
        raise MissingDependencyError(f"{path}: is a LoRA adapter and peft is missing", "pip install peft") from error
    base = str(adapter.get("base_model_name_or_path"))
    try:
        check_source(base)
    except ArtifactError as error:
        raise ArtifactError(
            f"{path}: its base model is not usable: {error.message}", "put the base model back, or train again"
        ) from error
    task = load_manifest(path, "checkpoint", verify=False).task
    loaded = load_for_training(base, task.name, **task.model_config)
    if random := sorted(set(loaded.new) - saved_keys(path)):
        raise ArtifactError(
            f"{path}: its weights are incomplete: {shown_keys(random)} are neither in the adapter nor in its base {base}, "
            "and were random when it was trained",
            "train again with these modules in modules_to_save (deploykit finetune puts them there)",
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft warns of every merge that it rounds; parity is measured at export
        return PeftModel.from_pretrained(loaded.model, str(path)).merge_and_unload().eval()
