"""Define the options of a fine-tuning run for language models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, cast, get_args

from deploykit.errors import UsageError
from deploykit.tasks.text_generation.encode import LossOn, OnLong
from deploykit.tasks.text_generation.facts import TextGeneration
from deploykit.training.options import FinetuneOptions

DEFAULT_LENGTH = 1024


@dataclass(frozen=True)
class TextGenerationOptions(FinetuneOptions):
    """``batch_tokens`` bounds the tokens of a batch; with ``packing`` rows stand one after another in it without padding,
    each seeing itself alone. ``chat_template`` names a built-in template or a file, in place of the checkpoint's own.
    ``max_length`` 0 is ``DEFAULT_LENGTH``, or the model's context where that is less.
    ``eval_rows`` held-out rows are answered, before and after training; all are scored."""

    task: str = TextGeneration.name
    max_length: int = 0
    epochs: float = 1.0
    learning_rate: float = 1e-4
    mixed_precision: str = "auto"
    schedule: str = "cosine"
    batch_tokens: int = 1024
    packing: bool = True
    prompt_column: str | None = None
    completion_column: str | None = None
    loss_on: str = "completion"
    on_long: str = "drop"
    chat_template: str | None = None
    show_rows: int = 1
    lora_target: str = "all-linear"
    lora_dropout: float = 0.05
    dora: bool = False
    rslora: bool = False
    neftune: float = 0.0
    gradient_checkpointing: bool = False
    eval_rows: int = 32
    held_out_rows: int = 500

    ranges: ClassVar[Mapping[str, tuple[float, float]]] = {
        **FinetuneOptions.ranges,
        "max_length": (0, 10_000_000),
        "batch_tokens": (16, 10_000_000),
        "show_rows": (0, 1000),
        "lora_dropout": (0, 0.99),
        "neftune": (0, 1000),
        "eval_rows": (0, 1_000_000),
        "held_out_rows": (1, 1_000_000_000),
    }

    def check(self) -> None:
        super().check()
        if self.model is None:
            raise UsageError("--model is missing", "give the folder of a checkpoint, a hub id, or a .gguf file")
        for name in ("dora", "rslora"):
            if getattr(self, name) and not self.lora_rank:
                raise UsageError(f"--{name} is a kind of adapter", "add --lora-rank")
        for name, kind in (("loss_on", LossOn), ("on_long", OnLong)):
            if getattr(self, name) not in get_args(kind):
                option = name.replace("_", "-")
                raise UsageError(f"--{option} is {getattr(self, name)!r}", f"give {', '.join(get_args(kind))}")
        if self.label_smoothing:
            raise UsageError("--label-smoothing is not for --task text-generation", "leave it out")
        if self.dropout is not None:
            raise UsageError("--dropout is not for --task text-generation", "leave it out")

    @property
    def long_rows(self) -> OnLong:
        return cast(OnLong, self.on_long)

    @property
    def supervised(self) -> LossOn:
        return cast(LossOn, self.loss_on)
