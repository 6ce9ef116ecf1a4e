"""Create LoRA adapters of language models, or load the adapter that a run starts from (``--init-adapter``)."""

from __future__ import annotations

import warnings
from dataclasses import fields
from pathlib import Path
from typing import Any

from deploykit.data.reading import flag
from deploykit.errors import ArtifactError, UsageError
from deploykit.tasks.text_generation.options import TextGenerationOptions
from deploykit.training import trainer
from deploykit.training.rows import Say
from deploykit.training.source import ADAPTER

_WEIGHTS = "adapter_model.safetensors"
_ALL = "all-linear"
_DEFAULTS = {field.name: field.default for field in fields(TextGenerationOptions)}


def with_adapter(model: Any, options: TextGenerationOptions, say: Say) -> Any:
    """Return ``model`` with an adapter, the only part that is trained: a new one, or that of ``--init-adapter``.

    Raises ArtifactError when the latter's weights do not fit the model.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _new(model, options) if options.init_adapter is None else _loaded(model, options, say)


def read_adapter(options: TextGenerationOptions) -> Any:
    """Return peft's ``LoraConfig`` of ``--init-adapter``.

    Raises ArtifactError for a folder without a LoRA adapter, and UsageError for options that differ from it.
    """
    from peft import LoraConfig, PeftConfig

    assert options.init_adapter is not None
    folder = Path(options.init_adapter)
    for name in (ADAPTER, _WEIGHTS):
        if not (folder / name).is_file():
            raise ArtifactError(
                f"--init-adapter {folder}: has no {name}", "give a folder that peft's save_pretrained wrote"
            )
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except Exception as error:  # peft raises whatever the JSON makes its classes raise
        raise ArtifactError(f"{folder / ADAPTER}: cannot be read: {error}", "save the adapter again") from error
    if not isinstance(config, LoraConfig):
        raise ArtifactError(
            f"--init-adapter {folder}: is an adapter of type {config.peft_type.value}", "give a LoRA adapter"
        )
    if config.modules_to_save or config.trainable_token_indices:
        raise ArtifactError(
            f"--init-adapter {folder}: contains whole modules or embeddings besides LoRA's matrices",
            "merge it into its base (PeftModel.merge_and_unload), and fine-tune that",
        )
    own = {
        "lora_r": config.r,
        "lora_alpha": config.lora_alpha,
        "use_dora": config.use_dora,
        "use_rslora": config.use_rslora,
    }
    for name, value in own.items():
        if getattr(options, name) not in (value, _DEFAULTS[name]):
            raise UsageError(
                f"{flag(name)} is {getattr(options, name)}, and the adapter {folder} has {value}", "leave it out"
            )
    targets = config.target_modules
    if options.lora_target_modules != _ALL and {*_names(options)} != {
        *([targets] if isinstance(targets, str) else targets)
    }:
        shown = targets if isinstance(targets, str) else ",".join(sorted(targets))
        raise UsageError(
            f"--lora-target-modules is {options.lora_target_modules}, and the adapter {folder} has {shown}",
            "leave it out",
        )
    return config


def _names(options: TextGenerationOptions) -> list[str]:
    return [name.strip() for name in options.lora_target_modules.split(",")]


def _new(model: Any, options: TextGenerationOptions) -> Any:
    names = _names(options)
    try:
        return trainer.with_adapter(
            model, options, "CAUSAL_LM", lora_dropout=options.lora_dropout, use_dora=options.use_dora,
            use_rslora=options.use_rslora, target_modules=_ALL if names == [_ALL] else names,
        )  # fmt: skip
    except ValueError as error:
        raise UsageError(
            f"--lora-target-modules {options.lora_target_modules}: {error}", "give all-linear, or names of layers"
        ) from error


def moved(adapted: Any, model: Any) -> Any:
    """Return ``model`` with the adapter of ``adapted``, which was trained on the same weights in another precision."""
    from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

    config = adapted.peft_config["default"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft and transformers about each other's next release
        found = get_peft_model(model, config)
        set_peft_model_state_dict(found, get_peft_model_state_dict(adapted))
    return found.eval()


def _loaded(model: Any, options: TextGenerationOptions, say: Say) -> Any:
    from peft import get_peft_model, set_peft_model_state_dict
    from safetensors.torch import load_file

    assert options.init_adapter is not None
    folder = Path(options.init_adapter)
    config = read_adapter(options)
    base = config.base_model_name_or_path
    config.inference_mode = False
    config.lora_dropout = options.lora_dropout
    try:
        adapted = get_peft_model(model, config)
        loaded = set_peft_model_state_dict(adapted, load_file(folder / _WEIGHTS))
        wrong = [*loaded.unexpected_keys, *(key for key in loaded.missing_keys if "lora_" in key)]
        problem = f"no place, or no weights, for {wrong[0]}" if wrong else ""
    except (ValueError, RuntimeError) as error:  # no such layers; other shapes
        problem = str(error)
    if problem:
        raise ArtifactError(
            f"--init-adapter {folder}: does not fit {options.origin}: {problem}",
            f"give the base that it was trained on; it names {base}",
        )
    say(f"continuing from the adapter {folder}: rank {config.r}, trained on {base}")
    return adapted
