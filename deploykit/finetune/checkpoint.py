"""Hugging Face checkpoints: found, checked, loaded safely, and run."""

from __future__ import annotations

import json
import logging
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from transformers import AutoConfig, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification, AutoTokenizer

from deploykit.artifacts import MANIFEST, load_manifest
from deploykit.errors import ArtifactError, MissingDependencyError
from deploykit.runtime.batching import batches
from deploykit.runtime.text import normalize
from deploykit.tasks import Classification, Task, Translation

_ADAPTER = "adapter_config.json"
_TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "spiece.model", "sentencepiece.bpe.model",
                    "tokenizer.model", "spm.model", "source.spm")  # fmt: skip
# Families whose tokenizer is several files: each of these sets is a whole one.
_TOKENIZER_SETS: Mapping[str, tuple[tuple[str, ...], ...]] = {
    "marian": (("source.spm", "target.spm", "vocab.json"),),
    "m2m_100": (("tokenizer.json",), ("sentencepiece.bpe.model", "vocab.json"), ("sentencepiece.bpe.model",)),
}
TRANSLATION_FAMILIES = ("marian", "m2m_100", "t5")
_MODELS: Mapping[str, Any] = {
    Classification.name: AutoModelForSequenceClassification,
    Translation.name: AutoModelForSeq2SeqLM,
}
_DEFAULT_MAX_LENGTH = 512


def quiet() -> None:
    """Keep transformers to errors: what matters of its messages, deploykit says itself."""
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("torch").setLevel(logging.ERROR)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")


def check_source(model: str, task: str | None = None) -> None:
    """Refuse what cannot be a checkpoint, before minutes are spent on data.

    Raises ArtifactError for a missing folder, a folder without config, weights or tokenizer, one with
    only pickled weights, or, when ``task`` is named, one made for another. A name that is no folder is
    taken as a hub id and checked when it is loaded.
    """
    path = Path(model)
    if not path.exists():
        if model.startswith((".", "/", "~")) or model.count("/") > 1 or len(path.parts) > 2:
            raise ArtifactError(f"{model}: no such model folder", "check the path, or give a hub id such as org/name")
        return
    if path.is_dir() and (path / MANIFEST).exists():
        made_for = load_manifest(path, "checkpoint").task.name
        if task is not None and made_for != task:
            raise ArtifactError(f"{model}: is a checkpoint for {made_for}, not {task}", f"give --task {made_for}")
    if not (path / "config.json").is_file() and not (path / _ADAPTER).is_file():
        raise ArtifactError(f"{model}: has no config.json", "pass the folder of a Hugging Face checkpoint")
    if not any(path.glob("*.safetensors")):
        pickled = [p.name for p in path.glob("*.bin")] + [p.name for p in path.glob("*.pt")]
        if pickled:
            raise ArtifactError(
                f"{model}: its weights are pickled ({', '.join(pickled)}), which can run code when loaded",
                "convert them: AutoModel.from_pretrained(...).save_pretrained(...) on a machine that trusts them",
            )
        raise ArtifactError(f"{model}: has no weights (*.safetensors)", "copy the checkpoint again")
    family = _family(path)
    if family and task is not None:
        check_family(model, family, task)
    sets = _TOKENIZER_SETS.get(family, tuple((name,) for name in _TOKENIZER_FILES))
    if not any(all((path / name).is_file() for name in names) for names in sets):
        missing = [name for name in sets[0] if not (path / name).is_file()] if family in _TOKENIZER_SETS else []
        raise ArtifactError(
            f"{model}: has no {', '.join(missing) or 'tokenizer'}",
            f"copy {', '.join(missing) or 'tokenizer.json'} beside config.json",
        )


def _family(path: Path) -> str:
    """The model type that a folder's config.json names; empty when there is none."""
    try:
        return str(json.loads((path / "config.json").read_text(encoding="utf-8"))["model_type"])
    except FileNotFoundError:
        return ""
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{path / 'config.json'}: names no model type", "copy the checkpoint again") from error


def check_family(model: str, family: str, task: str) -> None:
    """Raise ArtifactError when a checkpoint of type ``family`` is not for ``task``."""
    if task == Translation.name and family not in TRANSLATION_FAMILIES:
        raise ArtifactError(
            f"{model}: is of type {family}, which does not translate",
            f"give a checkpoint of type {', '.join(TRANSLATION_FAMILIES)}",
        )
    if task == Classification.name and family in TRANSLATION_FAMILIES:
        raise ArtifactError(f"{model}: is of type {family}, made for translation", f"give --task {Translation.name}")


def load_tokenizer(model: str, *, fast: bool = True) -> Any:
    """The checkpoint's tokenizer. Raises ArtifactError when there is none, or with ``fast`` no tokenizer.json."""
    check_source(model)
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
    return tokenizer


def load_model(model: str, task: str = Classification.name, **config: Any) -> Any:
    """The model of a checkpoint in fp32, in eval mode; ``config`` overrides its configuration.

    A LoRA adapter saved by ``finetune`` is merged into the weights it was trained on.
    """
    check_source(model, task)
    adapter = Path(model) / _ADAPTER
    try:
        if adapter.is_file():
            return _load_merged(Path(model), json.loads(adapter.read_text()))
        settings = AutoConfig.from_pretrained(model, trust_remote_code=False, **config)
        check_family(model, settings.model_type, task)
        # Eager attention exports to plain operators; the fused one does not.
        loaded = _MODELS[task].from_pretrained(
            model,
            config=settings,
            dtype=torch.float32,
            attn_implementation="eager",
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes="num_labels" in config,
        )
    except ArtifactError:
        raise
    except Exception as error:
        raise not_loadable(model, error) from error
    return loaded.eval()


def max_tokens(tokenizer: Any, config: Any) -> int:
    """The longest input, in tokens, that both the tokenizer and the position embeddings allow."""
    limits = [_DEFAULT_MAX_LENGTH]
    if tokenizer.model_max_length < 1_000_000:  # "no limit" is written as a huge number
        limits.append(tokenizer.model_max_length)
    positions = getattr(config, "max_position_embeddings", None)
    if positions:
        # RoBERTa and its descendants count positions from pad_token_id + 1.
        offset = config.pad_token_id + 1 if "roberta" in config.model_type or config.model_type == "camembert" else 0
        limits.append(positions - offset)
    return int(min(limits))


def task_of(path: Path, tokenizer: Any, config: Any) -> Classification:
    """The task in a checkpoint's manifest, or, for one trained elsewhere, what its config says."""
    if (path / MANIFEST).exists():
        task: Task = load_manifest(path, "checkpoint", verify=False).task
        assert isinstance(task, Classification), "load_model refuses others"
        return task
    labels = tuple(str(config.id2label[i]) for i in range(config.num_labels))
    return Classification(
        labels=labels,
        max_length=max_tokens(tokenizer, config),
        pad_token_id=pad_token_id(tokenizer),
        multi_label=config.problem_type == "multi_label_classification",
    )


def pad_token_id(tokenizer: Any) -> int:
    return int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0)


class TorchClassifier:
    """A checkpoint run by PyTorch: the reference every export is compared with."""

    def __init__(self, model: Any, tokenizer: Any, task: Classification) -> None:
        self.task = task
        self.model = model
        self.tokenizer = tokenizer

    @classmethod
    def load(cls, path: Path) -> TorchClassifier:
        quiet()
        tokenizer, model = load_tokenizer(str(path)), load_model(str(path))
        return cls(model, tokenizer, task_of(path, tokenizer, model.config))

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids as training and serving see them."""
        encoded = self.tokenizer([normalize(text) for text in texts], truncation=True, max_length=self.task.max_length)
        return [list(ids) for ids in encoded["input_ids"]]

    def logits(self, input_ids: NDArray[np.int64], attention_mask: NDArray[np.int64]) -> NDArray[np.float32]:
        """Raw outputs, float32 [rows, labels], of one padded batch (int64 [rows, tokens])."""
        with torch.inference_mode():
            output = self.model(input_ids=torch.from_numpy(input_ids), attention_mask=torch.from_numpy(attention_mask))
        return np.asarray(output.logits.numpy(), np.float32)

    def scores(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Probabilities, float32 [texts, labels]."""
        logits = np.empty((len(texts), len(self.task.labels)), np.float32)
        for batch in batches(self.encode(texts), self.task.pad_token_id, max_length=self.task.max_length):
            logits[batch.rows] = self.logits(batch.input_ids, batch.attention_mask)
        return self.task.scores(logits)

    def close(self) -> None:
        """Nothing to release: the model goes with the object."""


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
    task: Task = load_manifest(path, "checkpoint", verify=False).task
    model = load_model(base, task.name, **(label_config(task) if isinstance(task, Classification) else {}))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft warns of every merge that it rounds; parity is measured at export
        return PeftModel.from_pretrained(model, str(path)).merge_and_unload().eval()


def label_config(task: Classification) -> dict[str, Any]:
    """The Hugging Face configuration of the head that ``task`` needs."""
    return {
        "num_labels": len(task.labels),
        "id2label": dict(enumerate(task.labels)),
        "label2id": {label: i for i, label in enumerate(task.labels)},
        "problem_type": "multi_label_classification" if task.multi_label else "single_label_classification",
    }


def not_loadable(model: str, error: Exception) -> ArtifactError:
    """What transformers raised over ``model``, as an error that says what to do."""
    first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if not Path(model).exists():
        return ArtifactError(
            f"{model}: is no folder here and could not be fetched from the hub: {first_line}",
            "check the name and the network, or give the folder of a checkpoint",
        )
    return ArtifactError(f"{model}: cannot be loaded: {first_line}", "check that the checkpoint is whole")
