"""Find and check folders of Hugging Face checkpoints, before the slow imports of torch and transformers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deploykit.artifacts import MANIFEST, load_manifest
from deploykit.data.hub import connection_fault
from deploykit.data.open_text import is_git_lfs_pointer
from deploykit.errors import ArtifactError, UsageError
from deploykit.tasks.registry import get_task, owner_of

ADAPTER = "adapter_config.json"
"""The file that the folder of a LoRA adapter has in place of a config."""

_TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "spiece.model", "sentencepiece.bpe.model",
                    "tokenizer.model", "spm.model", "source.spm")  # fmt: skip
# Families whose tokenizer is several files: each of these sets is a whole one.
_TOKENIZER_SETS: Mapping[str, tuple[tuple[str, ...], ...]] = {
    "marian": (("source.spm", "target.spm", "vocab.json"),),
    "m2m_100": (("tokenizer.json",), ("sentencepiece.bpe.model", "vocab.json"), ("sentencepiece.bpe.model",)),
}


def check_source(model: str, task: str | None = None) -> None:
    """Refuse a folder that cannot be a checkpoint, before minutes are spent on data.

    Raises ArtifactError for a missing folder, a folder without config, weights or tokenizer, or, when ``task`` is named,
    a checkpoint for another task. A name that is not a folder is treated as a hub id and checked when it is loaded, if the
    hub can be reached.
    """
    path = Path(model)
    if not path.exists():
        beside_artifacts = any(path.parent.glob(f"*/{MANIFEST}")) if len(path.parts) == 2 else False
        if beside_artifacts or model.startswith((".", "/", "~")) or model.count("/") > 1 or len(path.parts) > 2:
            raise ArtifactError(f"{model}: no such model folder", "check the path, or give a hub id such as org/name")
        if fault := connection_fault(model):
            raise ArtifactError(
                f"{model}: is not a local folder, and cannot be fetched from the hub: {fault}",
                "check the name and the network, or give the folder of a checkpoint",
            )
        return
    if path.suffix == ".gguf" and path.is_file():
        _check_gguf(path, task)
        return
    if path.is_dir() and (path / MANIFEST).exists():
        made_for = load_manifest(path, "checkpoint").task.name
        if task is not None and made_for != task:
            raise ArtifactError(f"{model}: is a checkpoint for {made_for}, not {task}", f"give --task {made_for}")
    files = sorted(path.iterdir()) if path.is_dir() else []
    if pointer := next((file for file in files if file.is_file() and is_git_lfs_pointer(file)), None):
        raise ArtifactError(f"{pointer}: is a Git LFS pointer, not the file itself", "fetch it: git lfs pull")
    if not (path / MANIFEST).exists():
        refuse_adapter(path)
    if not (path / "config.json").is_file() and not (path / ADAPTER).is_file():
        gguf = next((str(file) for file in files if file.suffix == ".gguf"), None)
        raise ArtifactError(
            f"{model}: has no config.json",
            f"pass the file {gguf}" if gguf else "pass the folder of a Hugging Face checkpoint",
        )
    if not any(path.glob("*.safetensors")) and not any(path.glob("*_model*.bin")):  # pytorch_model, adapter_model
        others = sorted(p.name for suffix in ("bin", "pt", "h5", "msgpack") for p in path.glob(f"*.{suffix}"))
        raise ArtifactError(
            f"{model}: has no weights (model.safetensors, pytorch_model.bin)"
            + (f", only {', '.join(others)}" if others else ""),
            "copy the checkpoint again, or save it with save_pretrained",
        )
    family = _family(path)
    if family and task is not None:
        check_family(model, family, task)
    sets = _TOKENIZER_SETS.get(family, tuple((name,) for name in _TOKENIZER_FILES))
    if not any(all((path / name).is_file() for name in names) for names in sets):
        missing = [name for name in sets[0] if not (path / name).is_file()] if family in _TOKENIZER_SETS else []
        raise ArtifactError(
            f"{model}: has no {', '.join(missing) or 'tokenizer'}",
            f"copy {', '.join(missing) or 'tokenizer.json'} to the folder of config.json",
        )


def refuse_adapter(model: Path) -> None:
    """Raise UsageError for the folder of a LoRA adapter. Only deploykit's manifest says what the adapter's head answers."""
    if (model / ADAPTER).is_file():
        try:
            base = json.loads((model / ADAPTER).read_text(encoding="utf-8"))["base_model_name_or_path"]
        except (ValueError, KeyError, TypeError):
            base = "an unknown base"
        raise UsageError(
            f"{model}: is an adapter of {base}, not a whole checkpoint",
            "merge it first: PeftModel.merge_and_unload, then save_pretrained of the model and the tokenizer; or train its base"
            + ("; if its weights are merged, remove adapter_config.json" if (model / "config.json").is_file() else ""),
        )


def _check_gguf(path: Path, task: str | None) -> None:
    if task is not None and get_task(task).auto_model != "AutoModelForCausalLM":
        raise ArtifactError(f"{path}: is a GGUF file, which holds a language model", "give a checkpoint's folder")
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ArtifactError(f"{path}: is not a GGUF file", "copy it again")


def _family(path: Path) -> str:
    """Return the model type that a folder's config.json names; empty when there is none."""
    try:
        return str(read_json(path / "config.json")["model_type"])
    except FileNotFoundError:
        return ""
    except (KeyError, TypeError) as error:
        raise ArtifactError(f"{path / 'config.json'}: names no model type", "copy the checkpoint again") from error


def read_json(path: Path) -> Any:
    """Return what a JSON file holds. Raises ArtifactError if that is no JSON, such as half a download."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ArtifactError(
            f"{path}: is damaged, or not all of it is there: {error}", "copy the checkpoint again"
        ) from error


def check_family(model: str, family: str, task: str) -> None:
    """Raise ArtifactError when a checkpoint of type ``family`` is not for ``task``."""
    wanted, owner = get_task(task), owner_of(family)
    if wanted.model_types and owner is not wanted and family not in wanted.shared_types:
        raise ArtifactError(
            f"{model}: is of type {family}, which does not {wanted.verb}",
            f"give a checkpoint of type {', '.join((*wanted.model_types, *wanted.shared_types))}",
        )
    if owner not in (None, wanted):
        raise ArtifactError(f"{model}: is of type {family}, made for {owner.name}", f"give --task {owner.name}")
