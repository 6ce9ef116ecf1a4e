"""Read the weights of a checkpoint into a model, and refuse a checkpoint that would leave a weight random.

transformers fills missing weights with random numbers and continues. Here every key of the file is compared with every
key of the model: a difference is an error that lists the keys, or, before training, a new head.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
import transformers
from huggingface_hub import snapshot_download
from transformers import GenerationConfig

from deploykit.errors import ArtifactError
from deploykit.training.last_end_token import read_last_end

_LOG = logging.getLogger(__name__)
_SAFETENSORS = ("model.safetensors", "model.safetensors.index.json")
_PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_HUB_FILES = ("config.json", "generation_config.json", "model.safetensors", "model-*-of-*.safetensors", _SAFETENSORS[1])
_HUB_PICKLED = ("pytorch_model.bin", "pytorch_model-*-of-*.bin", _PICKLED[1])
_ADAPTER = ("adapter_model.safetensors", "adapter_model.bin")
_COMPILED = "_orig_mod."
_PARALLEL = "module."
_KEYS_SHOWN = 6
# Weights that a published base model of the family lacks, because its authors' model adds zeros there.
_ZERO_WHEN_BARE: Mapping[str, str] = {"bart": "final_logits_bias"}
# Heads whose weights have the same keys and shapes as a classifier's, in some types (ModernBERT's for tokens).
_OTHER_HEADS = ("ForTokenClassification", "ForMultipleChoice")
# Constants that older versions of transformers and fairseq saved with the weights; models compute their own.
_CONSTANT = re.compile(
    r"(^|\.)(version|_float_tensor|masked_bias|position_ids|token_type_ids|inv_freq|cos_cached|sin_cached|embed_positions\.weights)$"
)
_POOLER = re.compile(r"(^|\.)pooler\.")


@dataclass(frozen=True)
class Loaded:
    """``model`` in fp32 and eval mode. ``new``: the keys of a head that the checkpoint lacks, which has random weights."""

    model: Any
    new: tuple[str, ...] = ()


def load_reported(auto_model: str, checkpoint: str, config: Any, *, new_head: bool = False) -> Loaded:
    """Load ``checkpoint`` (a folder or a hub id) as the class that ``auto_model`` has for its ``config``.

    Weights come from safetensors, or from pytorch_model.bin by ``torch.load(weights_only=True)``. The prefixes that
    ``torch.compile`` and DistributedDataParallel put before keys are removed. Both are logged in one line each.

    With ``new_head`` the head and the pooler may be missing or of another size: they are initialized, and ``Loaded.new``
    lists them. Raises ArtifactError, with the keys and the likely cause, when any other weight is missing, has another
    shape, is in the file without a place in the model, or is not finite.
    """
    folder = local_folder(checkpoint)
    weights, file = read_weights(folder, checkpoint)
    if file.endswith(".bin"):
        _LOG.warning(
            "%s: %s is read with torch.load(weights_only=True); deploykit writes safetensors", checkpoint, file
        )
    weights, prefixes = _without_prefixes(weights)
    if prefixes:
        _LOG.warning("%s: took the prefix %s off its keys", checkpoint, " and ".join(prefixes))
    # Eager attention exports to plain operators; the fused one does not.
    model, report = _model_class(auto_model, config, checkpoint).from_pretrained(
        None,
        config=config,
        state_dict=weights,
        dtype=torch.float32,
        attn_implementation="eager",
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    model.name_or_path = model.config.name_or_path = checkpoint  # where an adapter says that its base is
    if model.can_generate():
        model.generation_config = read_generation_config(str(folder))
    found = _compare(model, weights, report)
    head, parts = _head_test(model), {_parent(key) for key in weights}
    new = {key for key in (*found.missing, *found.mismatched) if new_head and head(key)}
    new -= {key for key in found.missing if _parent(key) in parts}  # a part of a layer is missing, not the head
    unused = {key for key in found.unexpected if found.changes_nothing(key, model) or (new_head and head(key))}
    if found.keys() - new - unused:
        raise _refusal(checkpoint, file, model, found.without(new))
    if not new_head and (other := _other_head(model, config)):
        raise ArtifactError(
            f"{checkpoint}: its config.json says that it is a {other}, not a {type(model).__name__}; the keys are the same",
            "give a checkpoint of the task, or fine-tune this one for it first",
        )
    if unused and not new_head:
        _LOG.warning("%s: left out weights that the model has no use for: %s", checkpoint, shown_keys(unused))
    if broken := [key for key, value in model.named_parameters() if not value.isfinite().all()]:
        raise ArtifactError(
            f"{checkpoint}: weights are not finite numbers (NaN or infinite): {shown_keys(broken)}",
            "take an earlier checkpoint: the training that wrote this one diverged, or the file is damaged",
        )
    return Loaded(read_last_end(model.eval()), tuple(sorted(new)))


def local_folder(checkpoint: str) -> Path:
    """Return the folder of a checkpoint; the configuration and weights of a hub id are downloaded first."""
    if Path(checkpoint).is_dir():
        return Path(checkpoint)
    folder = Path(snapshot_download(checkpoint, allow_patterns=list(_HUB_FILES)))
    if not any((folder / name).exists() for name in _SAFETENSORS):
        folder = Path(snapshot_download(checkpoint, allow_patterns=[*_HUB_FILES, *_HUB_PICKLED]))
    return folder


def read_generation_config(checkpoint: str) -> GenerationConfig:
    """Return generation_config.json, or, if it is missing, the fields that older checkpoints keep in config.json."""
    try:
        return GenerationConfig.from_pretrained(checkpoint)
    except OSError:
        return GenerationConfig.from_pretrained(checkpoint, config_file_name="config.json", _from_model_config=True)


def read_weights(folder: Path, name: str) -> tuple[dict[str, torch.Tensor], str]:
    """Return the tensors of a checkpoint by key, and the name of the (first) file that they are in.

    Safetensors are taken before pytorch_model.bin. Raises ArtifactError when there are none, when a part is missing or
    damaged, and when a .bin holds anything but tensors.
    """
    for file in (*_SAFETENSORS, *_PICKLED):
        if not (folder / file).is_file():
            continue
        parts = _parts(folder / file) if file.endswith(".json") else [file]
        weights: dict[str, torch.Tensor] = {}
        for part in parts:
            weights |= _read(folder / part)
        return weights, parts[0]
    other = sorted(path.name for path in folder.glob("*.safetensors"))
    if other:
        raise ArtifactError(f"{name}: has {', '.join(other)}, but no model.safetensors", f"rename {other[0]}")
    raise ArtifactError(f"{name}: has no weights (model.safetensors, pytorch_model.bin)", "copy the checkpoint again")


def saved_keys(adapter: Path) -> set[str]:
    """Return the keys of the base model that a LoRA adapter has whole, as its modules_to_save."""
    file = next((adapter / name for name in _ADAPTER if (adapter / name).is_file()), None)
    if file is None:
        raise ArtifactError(f"{adapter}: has no weights (adapter_model.safetensors)", "copy the adapter again")
    keys = (key.removeprefix("base_model.model.") for key in _read(file))
    return {key.replace(".modules_to_save", "").replace(".default", "") for key in keys if ".lora_" not in key}


def _model_class(auto_model: str, config: Any, name: str) -> Any:
    """Return the class of a model: the auto class does not take weights that are already read."""
    try:
        return getattr(transformers, auto_model)._model_mapping[type(config)]
    except KeyError as error:
        kind = auto_model.removeprefix("AutoModel")
        raise ArtifactError(
            f"{name}: is of type {config.model_type}, which transformers has no model {kind} of",
            "give a checkpoint of another type",
        ) from error


def _parts(index: Path) -> list[str]:
    try:
        return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError) as error:
        raise ArtifactError(f"{index}: is not an index of weights: {error}", "copy the checkpoint again") from error


def _read(path: Path) -> dict[str, torch.Tensor]:
    if not path.is_file():
        raise ArtifactError(f"{path}: no such file, which the index of the weights names", "copy the checkpoint again")
    if path.suffix == ".safetensors":
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - it is no dictionary
        except safetensors.SafetensorError as error:
            raise ArtifactError(f"{path}: is damaged: {error}", "copy the checkpoint again") from error
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle raises whatever the bytes lead it to
        raise ArtifactError(
            f"{path}: holds something other than tensors, or is damaged; such a file can run code when loaded",
            "get the checkpoint as safetensors",
        ) from error
    if not isinstance(found, dict) or not all(isinstance(value, torch.Tensor) for value in found.values()):
        kinds = (
            sorted({type(v).__name__ for v in found.values()}) if isinstance(found, dict) else [type(found).__name__]
        )
        raise ArtifactError(
            f"{path}: holds {', '.join(kinds)}, not a table of tensors by key",
            "save the model alone, with save_pretrained",
        )
    return found


def _without_prefixes(weights: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Remove the prefixes that wrappers put before keys; also returns the removed prefixes."""
    prefixes = []
    if any(_COMPILED in key for key in weights):
        weights = {key.replace(_COMPILED, ""): value for key, value in weights.items()}
        prefixes.append(_COMPILED)
    if weights and all(key.startswith(_PARALLEL) for key in weights):
        weights = {key.removeprefix(_PARALLEL): value for key, value in weights.items()}
        prefixes.append(_PARALLEL)
    return weights, prefixes


@dataclass(frozen=True)
class _Differences:
    """Keys that only the model has, that only the file has, and that have two shapes (file's, model's)."""

    missing: frozenset[str]
    unexpected: frozenset[str]
    mismatched: Mapping[str, tuple[Any, Any]]

    def keys(self) -> frozenset[str]:
        return self.missing | self.unexpected | self.mismatched.keys()

    def without(self, keys: Collection[str]) -> _Differences:
        mismatched = {key: shapes for key, shapes in self.mismatched.items() if key not in keys}
        return _Differences(self.missing - frozenset(keys), self.unexpected, mismatched)

    def changes_nothing(self, key: str, model: Any) -> bool:
        """Return whether an unexpected key is a constant's, a pooler's that the head does not read, or of a head for another
        purpose."""
        own = {part for mine in model.state_dict() for part in (_first(mine), _first(_below(model, mine)))}
        return bool(_CONSTANT.search(key) or _POOLER.search(key)) or _first(key) not in own


def _compare(model: Any, weights: Mapping[str, torch.Tensor], report: Mapping[str, Any]) -> _Differences:
    missing = set(report["missing_keys"])
    # transformers ignores these silently; keys that it does not save either are computed, not learned.
    silent, computed = (
        _matching(getattr(model, name, None)) for name in ("_keys_to_ignore_on_load_missing", "_keys_to_ignore_on_save")
    )
    bare = not any(key.startswith(f"{model.base_model_prefix}.") for key in weights)
    for key in model.state_dict().keys() - model.all_tied_weights_keys.keys():
        zero = bare and _ZERO_WHEN_BARE.get(model.config.model_type) == key
        if silent(key) and not computed(key) and not zero and not _holds(weights, model, key):
            missing.add(key)
    mismatched = {key: (tuple(theirs), tuple(ours)) for key, theirs, ours in report["mismatched_keys"]}
    return _Differences(frozenset(missing), frozenset(report["unexpected_keys"]), mismatched)


def _matching(patterns: Iterable[str] | None) -> Callable[[str], bool]:
    found = [re.compile(pattern) for pattern in patterns or ()]
    return lambda key: any(pattern.search(key) for pattern in found)


def _holds(weights: Mapping[str, torch.Tensor], model: Any, key: str) -> bool:
    return key in weights or _below(model, key) in weights


def _parent(key: str) -> str:
    return key.rpartition(".")[0]


def _first(key: str) -> str:
    return key.split(".", 1)[0]


def _below(model: Any, key: str) -> str:
    """Return the name that a key of ``model`` has in its base model, saved alone."""
    return key.removeprefix(f"{model.base_model_prefix}.")


def _head_test(model: Any) -> Callable[[str], bool]:
    """Return whether a key, of the model or of a file, is outside the base model, or its pooler's."""
    base = model.base_model
    if base is model:
        return lambda key: False
    own = {_first(key) for key in base.state_dict()} | {model.base_model_prefix}
    return lambda key: _first(key) not in own or _POOLER.search(key) is not None


def _refusal(checkpoint: str, file: str, model: Any, found: _Differences) -> ArtifactError:
    lines = []
    if found.missing:
        lines.append(f"missing from {file}: {shown_keys(found.missing)}")
    if found.unexpected:
        lines.append(f"in {file} without a place in the model: {shown_keys(found.unexpected)}")
    if found.mismatched:
        shapes = [f"{key} {theirs} for {ours}" for key, (theirs, ours) in sorted(found.mismatched.items())]
        lines.append(f"of another shape than the model's: {shown_keys(shapes)}")
    cause, remedy = _cause(model, found)
    return ArtifactError(f"{checkpoint}: its weights do not fit the model: {'; '.join(lines)}. {cause}", remedy)


def _cause(model: Any, found: _Differences) -> tuple[str, str]:
    head, kind = _head_test(model), type(model).__name__
    if prefix := _foreign_prefix(model, found):
        return (
            f"Keys begin with {prefix!r}: the model was saved as a part of another",
            f"save the {kind} alone, or rename the keys",
        )
    if found.mismatched and all(head(key) for key in found.mismatched):
        return (
            f"Its config.json names {model.config.num_labels} labels, and the head has another number",
            "correct num_labels, id2label and label2id in config.json",
        )
    if found.mismatched:
        return "Its config.json is of a model of another size", "copy the config.json that belongs to the weights"
    if {_parent(key) for key in found.missing} == {_output_layer(model)}:
        return (
            "Its config.json says that the output layer has weights of its own (tie_word_embeddings is false)",
            "set tie_word_embeddings to true if they are those of the embedding; otherwise copy the checkpoint again",
        )
    if found.missing and all(head(key) for key in found.missing):
        return (
            f"It has no trained head of a {kind}: it is a base model, or was trained for something else",
            "fine-tune it first",
        )
    if any(re.search(r"\.\d+\.", key) for key in (*found.missing, *found.unexpected)):
        return (
            "Its config.json has another number of layers, or another kind of layer, than the file",
            "copy the config.json that belongs to the weights, or the whole checkpoint again",
        )
    return (
        f"The file is not a whole {kind}",
        "copy the checkpoint again, or save it with save_pretrained of its own class",
    )


def _other_head(model: Any, config: Any) -> str | None:
    """Return the class that ``config`` names in place of the model's, if its head may be taken for the model's."""
    names = [str(name) for name in config.architectures or ()]
    if type(model).__name__ in names:
        return None
    return next((name for name in names if name.endswith(_OTHER_HEADS)), None)


def _output_layer(model: Any) -> str | None:
    """Return the name of a language model's output layer."""
    layer = model.get_output_embeddings()
    return next((name for name, module in model.named_modules() if layer is not None and module is layer), None)


def _foreign_prefix(model: Any, found: _Differences) -> str:
    """Return the prefix of the missing keys' names in the file; empty if they are not there."""
    mine = {name for key in found.missing for name in (key, _below(model, key))}
    for key in found.unexpected:
        names = key.split(".")
        for i in range(1, len(names)):
            if ".".join(names[i:]) in mine:
                return ".".join(names[:i]) + "."
    return ""


def shown_keys(keys: Collection[str]) -> str:
    """Write keys in one line, those of a numbered layer together, no more than six."""
    layers: dict[str, int] = {}
    for key in sorted(keys):
        layer = re.sub(r"(\.\d+)\..*", r"\1.*", key)
        layers[layer] = layers.get(layer, 0) + 1
    names = [f"{name} ({count} keys)" if name.endswith("*") else name for name, count in layers.items()]
    more = f" and {len(names) - _KEYS_SHOWN:,} more" if len(names) > _KEYS_SHOWN else ""
    return ", ".join(names[:_KEYS_SHOWN]) + more
