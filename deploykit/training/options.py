"""Define the options that the fine-tuning runs of every task share."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from deploykit.data.reading import Reading, flag
from deploykit.errors import UsageError

RENAMED: Mapping[str, str] = {
    "max_rows": "max_train_samples",
    "epochs": "num_train_epochs",
    "batch_size": "per_device_train_batch_size",
    "accumulation": "gradient_accumulation_steps",
    "schedule": "lr_scheduler_type",
    "warmup": "warmup_ratio",
    "label_smoothing": "label_smoothing_factor",
    "early_stopping": "early_stopping_patience",
    "lora_rank": "lora_r",
    "lora_target": "lora_target_modules",
    "source": "source_lang",
    "target": "target_lang",
    "beam": "num_beams",
}
"""Other names of options, mostly earlier ones, which the command line and TOML files written before still have, and those of today:
Hugging Face's, from ``TrainingArguments``, its example scripts, ``LoraConfig`` and ``GenerationConfig``."""


_SCHEDULES = ("linear", "cosine", "constant", "constant_with_warmup", "inverse_sqrt", "polynomial")


def described(
    default: Any, help_text: str = "", choices: Iterable[str] = (), values: Iterable[str] = (), hidden: bool = False
) -> Any:
    """Declare a field with its help text for ``deploykit finetune --help``. A class may set another default.

    ``values`` name the values after the option if there are several. A ``hidden`` option is not shown.
    """
    metadata = {"help": help_text, "choices": tuple(choices), "values": tuple(values), "hidden": hidden}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class FinetuneOptions(Reading):
    """Options of every run: how its rows are read (``Reading``), and how it trains.

    Rates and fractions are of 1, lengths are tokens, and 0 turns an optional one off.
    """

    model: str | None = None
    task: str = ""
    train: str = described(
        "",
        "Training rows: csv, tsv, jsonl, parquet, HF dataset folder or hub id; for translation also TMX, .po, .mo, or two "
        "text files as a.en,a.fr; for questions SQuAD's JSON. Default with --qat: the rows of the run TARGET.",
    )
    validation: str | None = described(None, "Rows for choosing the best step (default: split off --train).")
    test: str | None = described(None, "Rows for measuring the result (default: split off --train).")
    validation_fraction: float = described(
        0.1, "Share of the rows for validation, without --validation; 0: train on all rows."
    )
    test_fraction: float = described(0.1, "Share of the rows for the test, without --test.")
    max_train_samples: int = described(0, "Maximum rows of the training data, before splits; 0: all.")
    max_length: int = described(
        128,
        "Maximum tokens of a text; longer texts are truncated, or read in windows (question answering), longer pairs "
        "dropped, language models' rows handled as --on-long says. 0: chosen from the rows (classification), or 1024 or the "
        "model's limit if that is lower (text-generation).",
    )
    num_train_epochs: float = described(3.0, "Number of epochs; 0: chosen from the rows (classification).")
    max_steps: int = described(0, "Optimizer steps; overrides --num-train-epochs; 0: off.")
    gradient_accumulation_steps: int = described(1, "Batches per optimizer step.")
    learning_rate: float = described(5e-5, "Peak learning rate; 0: chosen from the model (classification).")
    optimizer: str = described("adamw", "Optimizer.", choices=("adamw", "sgd"))
    lr_scheduler_type: str = described("linear", "Schedule of the learning rate.", choices=_SCHEDULES)
    warmup_ratio: float = described(0.1, "Share of the steps with a rising learning rate.")
    weight_decay: float = described(0.01, "Decay of the weights per step, times the learning rate.")
    l1: float = described(
        0.0, "Move each weight by this times the learning rate towards 0 per step (proximal L1); 0: off."
    )
    l2: float = described(
        0.0, "Add this times the weights to the gradient (coupled L2; --weight-decay is decoupled); 0: off."
    )
    layerwise_lr_decay: float = described(
        1.0, "Multiply the learning rate by this from each layer to the one below; 1: off."
    )
    freeze_layers: int = described(0, "Keep the embeddings and this many of the lowest layers as they are; 0: off.")
    gradual_unfreezing: float = described(
        0.0, "Unfreeze the layers from the top, one by one, in this share of the run; 0: off."
    )
    ema_decay: float = described(
        0.0, "Use an exponential average of the weights; this is the share that each step keeps, such as 0.99; 0: off."
    )
    swa_start: float = described(
        0.0, "Use the mean of the weights of all steps after this share of the run (SWA), such as 0.75; 0: off."
    )
    max_grad_norm: float = described(1.0, "Clip gradients; 0: off.")
    dropout: float | None = described(None, "Dropout (default: the checkpoint's; 0.1 with --from-config).")
    attention_dropout: float | None = described(None, "Dropout of attention weights (default: the checkpoint's).")
    label_smoothing_factor: float = described(
        0.0, "Share of the target probability that is spread over all classes or tokens."
    )
    early_stopping_patience: int = described(0, "Stop after this many evaluations without improvement; 0: off.")
    eval_steps: int = described(0, "Evaluate and save every so many steps; 0: by epoch.")
    mixed_precision: str = described(
        "no", "Mixed precision. auto: bf16 if the machine supports it.", ("no", "bf16", "fp16", "auto")
    )
    lora_r: int = described(0, "Train a LoRA adapter of this rank, merged at export; 0: all weights.")
    lora_alpha: int = described(16, "Scale of a LoRA adapter: its output is multiplied by alpha / rank.")
    seed: int = described(0, "Seed for splits, shuffling and new weights.")

    dropouts: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "dropout": ("hidden_dropout_prob", "dropout", "hidden_dropout", "mlp_dropout", "embd_pdrop", "resid_pdrop"),
        "attention_dropout": ("attention_probs_dropout_prob", "attention_dropout", "attn_pdrop"),
    }
    """Option -> the names that configurations of models have for it."""

    shares_batches: ClassVar[bool] = False
    """Whether several processes can train a model of the task together."""

    # option -> lowest and highest value
    ranges: ClassVar[Mapping[str, tuple[float, float]]] = {
        "validation_fraction": (0, 0.9),
        "test_fraction": (0, 0.9),
        "warmup_ratio": (0, 1),
        "weight_decay": (0, 1),
        "l1": (0, 100),
        "l2": (0, 100),
        "layerwise_lr_decay": (0.01, 1),
        "freeze_layers": (0, 1000),
        "gradual_unfreezing": (0, 1),
        "ema_decay": (0, 0.999999),
        "swa_start": (0, 0.99),
        "label_smoothing_factor": (0, 0.99),
        "attention_dropout": (0, 0.99),
        "dropout": (0, 0.99),
        "learning_rate": (1e-12, 10),
        "num_train_epochs": (1e-6, 1e6),
        "max_steps": (0, 10**9),
        "max_train_samples": (0, 10**12),
        "max_length": (3, 100_000),
        "gradient_accumulation_steps": (1, 100_000),
        "early_stopping_patience": (0, 10**6),
        "eval_steps": (0, 10**9),
        "lora_r": (0, 4096),
        "lora_alpha": (1, 65536),
        "max_grad_norm": (0, 1e9),
        "seed": (0, 2**31 - 1),  # numpy takes twice as many; a search adds to it
    }

    @property
    def origin(self) -> str:
        """The checkpoint or the preset that the run starts from."""
        assert self.model is not None
        return self.model

    def refuse_without(self, owner: str, *names: str) -> None:
        """Raise UsageError for a changed option of ``names`` if ``owner``, the option that it belongs to, is not given."""
        for name in names:
            if getattr(self, owner) in (None, False) and getattr(self, name) != getattr(type(self), name):
                raise UsageError(f"{flag(name)} is for {flag(owner)}", f"add {flag(owner)}, or leave it out")

    def dropout_config(self, config: Any) -> dict[str, float]:
        """Return the dropouts that are given, under the names that ``config`` has for them.

        Raises UsageError if it has none for one that is given.
        """
        found: dict[str, float] = {}
        for option, names in self.dropouts.items():
            if (value := getattr(self, option)) is None:
                continue
            known = [name for name in names if hasattr(config, name)]
            if not known:
                raise UsageError(f"{flag(option)}: a {config.model_type} has no such dropout", "leave it out")
            found |= dict.fromkeys(known, value)
        return found

    @property
    def unset(self) -> tuple[str, ...]:
        """The unset options, which the run chooses from its model and rows. Such a task needs a stage with ``complete``."""
        return ()

    @property
    def validates(self) -> bool:
        """Whether there are validation rows: steps are evaluated on them, and the best is kept."""
        return self.validation is not None or self.validation_fraction > 0

    @classmethod
    def preset(cls, name: str | None) -> Mapping[str, Any]:
        """Return the options with which a new model of the preset ``name`` trains well."""
        return {}

    @classmethod
    def of_run(cls, facts: Any) -> Mapping[str, Any]:
        """Return the options that read the rows which a run with these facts has kept."""
        return {}

    def check(self) -> None:
        """Raise UsageError for the first invalid value."""
        super().check()
        for name, (low, high) in self.ranges.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise UsageError(f"{flag(name)} is {value}", f"give a value from {low} to {high}")
        if not self.train:
            raise UsageError("--train is missing", "name the rows to train on")
        if self.ema_decay and self.swa_start:
            raise UsageError("--ema-decay and --swa-start are two averages of the weights", "leave one out")
        if self.early_stopping_patience and not self.validates:
            raise UsageError(
                "--early-stopping-patience needs validation rows, and --validation-fraction is 0",
                "give --validation, or leave --early-stopping-patience out",
            )


def fit_multiple(kind: type[FinetuneOptions], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options with a tuple for each that may be repeated, and one value for each other that came as a tuple.

    Raises UsageError for an option that was repeated and may not be.
    """
    several = {field.name for field in dataclasses.fields(kind) if isinstance(field.default, tuple)}
    fitted: dict[str, Any] = {}
    for name, value in given.items():
        if name in several:
            fitted[name] = (value,) if isinstance(value, str) else () if value is None else tuple(value)
        elif isinstance(value, tuple | list):
            if len(value) > 1:
                raise UsageError(f"{flag(name)} is given {len(value)} times", "give one")
            fitted[name] = value[0] if value else None
        else:
            fitted[name] = value
    return fitted


def write_toml(options: FinetuneOptions, path: Path) -> None:
    """Write the options as TOML, which ``read_toml`` reads back to equal options."""
    import tomli_w

    values = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(options).items()}
    path.write_text(tomli_w.dumps({k: v for k, v in values.items() if v is not None}), encoding="utf-8")


def option_names(kind: type[FinetuneOptions]) -> set[str]:
    return {field.name for field in dataclasses.fields(kind)}
