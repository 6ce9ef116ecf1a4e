"""Define the options of a fine-tuning run for language models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, cast, get_args

from deploykit.data.noise import check_noises
from deploykit.data.reading import flag
from deploykit.errors import UsageError
from deploykit.tasks.text_generation.encode import LossOn, OnLong
from deploykit.tasks.text_generation.facts import TextGeneration
from deploykit.tasks.text_generation.metrics import compiled
from deploykit.tasks.text_generation.syntax import SYNTAXES, check_syntax
from deploykit.training.options import FinetuneOptions, described

DEFAULT_LENGTH = 1024


@dataclass(frozen=True)
class TextGenerationOptions(FinetuneOptions):
    """``batch_tokens`` limits the tokens of a batch; with ``packing`` the rows of a batch are concatenated without padding,
    and each attends only to itself. ``chat_template`` names a built-in template or a file that replaces the checkpoint's own.
    ``max_length`` 0 is ``DEFAULT_LENGTH``, or the model's context if that is shorter.
    ``eval_rows`` held-out rows are answered, before and after training; all are scored."""

    task: str = TextGeneration.name
    max_length: int = 0
    num_train_epochs: float = 1.0
    learning_rate: float = 1e-4
    mixed_precision: str = "auto"
    lr_scheduler_type: str = "cosine"
    batch_tokens: int = 1024
    packing: bool = described(True, "Pack rows into batches without padding.")
    prompt_column: str | None = described(None, "Prompt column (default: detected).")
    completion_column: str | None = described(None, "Completion column (default: detected).")
    loss_on: str = described(
        "completion", "Tokens that are learned: all answers, the last one, or everything.", get_args(LossOn)
    )
    on_long: str = described("drop", "What to do with a row longer than --max-length.", get_args(OnLong))
    chat_template: str | None = described(
        None, "chatml, alpaca or a Jinja file, in place of the checkpoint's own template."
    )
    show_rows: int = described(1, "Training rows to print, supervised tokens in green.")
    lora_target_modules: str = described("all-linear", "Layers to adapt, joined by commas, or all-linear.")
    lora_dropout: float = described(0.05, "Dropout of the adapter.")
    init_adapter: str | None = described(None, "Start from this LoRA adapter of TARGET, a folder that peft saved.")
    load_in_4bit: bool = described(False, "Train the adapter on top of 4-bit weights (QLoRA), on an NVIDIA GPU.")
    use_dora: bool = described(False, "Adapt direction and magnitude of the weights separately (DoRA).")
    use_rslora: bool = described(False, "Scale an adapter by the root of its rank (rsLoRA).")
    neftune_noise_alpha: float = described(0.0, "Noise on the embeddings while training (NEFTune); 0: off.")
    gradient_checkpointing: bool = described(False, "Recompute activations: less memory, but more time.")
    answer_regex: str | None = described(
        None, "Compare only the last match of this (its first group) in generated answers."
    )
    syntax: str | None = described(None, "Count the generated answers that parse.", SYNTAXES)
    teacher: str | None = None
    distill_alpha: float = 0.5
    distill_temperature: float = 2.0
    augment: tuple[str, ...] = ()
    r_drop: float = 0.0
    student_layers: int = described(0, hidden=True)
    eval_rows: int = 32
    held_out_rows: int = 500

    shares_batches: ClassVar[bool] = True

    ranges: ClassVar[Mapping[str, tuple[float, float]]] = {
        **FinetuneOptions.ranges,
        "max_length": (0, 10_000_000),
        "batch_tokens": (16, 10_000_000),
        "show_rows": (0, 1000),
        "lora_dropout": (0, 0.99),
        "neftune_noise_alpha": (0, 1000),
        "r_drop": (0, 100),
        "distill_alpha": (0, 1),
        "distill_temperature": (0.01, 100),
        "student_layers": (0, 1000),
        "eval_rows": (0, 1_000_000),
        "held_out_rows": (1, 1_000_000_000),
    }

    def check(self) -> None:
        super().check()
        if self.model is None:
            raise UsageError("TARGET is missing", "give the folder of a checkpoint, a hub id, or a .gguf file")
        for name in ("use_dora", "use_rslora"):
            if getattr(self, name) and not self.adapts:
                raise UsageError(f"{flag(name)} is a kind of adapter", "add --lora-r")
        if self.load_in_4bit:
            if not self.adapts:
                raise UsageError("--load-in-4bit trains an adapter", "add --lora-r")
            if self.origin.endswith(".gguf"):
                raise UsageError(
                    f"--load-in-4bit does not read GGUF files, and {self.origin} is one",
                    "give the folder of the Hugging Face checkpoint",
                )
        self.refuse_without("teacher", "distill_alpha", "distill_temperature")
        if self.student_layers and self.adapts:
            raise UsageError(
                "--student changes the checkpoint that an adapter is for", "leave one out: --lora-r 0 trains all"
            )
        if self.syntax is not None:
            check_syntax(self.syntax)
        if self.answer_regex is not None:
            compiled(self.answer_regex)
        for name, kind in (("loss_on", LossOn), ("on_long", OnLong)):
            if getattr(self, name) not in get_args(kind):
                raise UsageError(f"{flag(name)} is {getattr(self, name)!r}", f"give {', '.join(get_args(kind))}")
        if self.label_smoothing_factor:
            raise UsageError("--label-smoothing-factor is not for --task text-generation", "leave it out")
        check_noises(self.augment, "prompts")
        if self.augment and self.loss_on == "all":
            raise UsageError(
                "--augment changes prompts, and with --loss-on all the model would learn to write them",
                "leave one out",
            )

    @property
    def unset(self) -> tuple[str, ...]:
        return () if self.max_length else ("max_length",)

    @property
    def adapts(self) -> bool:
        """Whether an adapter is trained, not all weights."""
        return self.lora_r > 0 or self.init_adapter is not None

    @property
    def long_rows(self) -> OnLong:
        return cast(OnLong, self.on_long)

    @property
    def supervised(self) -> LossOn:
        return cast(LossOn, self.loss_on)
