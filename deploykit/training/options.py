"""Define the options that the fine-tuning runs of every task share."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from deploykit.data.reading import Reading
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
    "source": "source_lang",
    "target": "target_lang",
    "beam": "num_beams",
}
"""Earlier names of options, which the command line and TOML files written before still have, and those of today:
Hugging Face's, from ``TrainingArguments``, its example scripts, ``LoraConfig`` and ``GenerationConfig``."""


@dataclass(frozen=True)
class FinetuneOptions(Reading):
    """What every run chooses: how its rows are read (``Reading``), and how it trains. Rates and fractions are of 1; lengths are tokens; 0 turns the optional ones off."""

    model: str | None = None
    train: str = ""
    task: str = ""
    validation: str | None = None
    test: str | None = None
    validation_fraction: float = 0.1
    test_fraction: float = 0.1
    max_train_samples: int = 0
    max_length: int = 128
    num_train_epochs: float = 3.0
    max_steps: int = 0
    gradient_accumulation_steps: int = 1
    learning_rate: float = 5e-5
    optimizer: str = "adamw"
    lr_scheduler_type: str = "linear"
    warmup_ratio: float = 0.1
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    dropout: float | None = None
    label_smoothing_factor: float = 0.0
    early_stopping_patience: int = 0
    eval_steps: int = 0
    mixed_precision: str = "no"
    lora_r: int = 0
    lora_alpha: int = 16
    seed: int = 0

    # option -> lowest and highest value
    ranges: ClassVar[Mapping[str, tuple[float, float]]] = {
        "validation_fraction": (0, 0.9),
        "test_fraction": (0, 0.9),
        "warmup_ratio": (0, 1),
        "weight_decay": (0, 1),
        "label_smoothing_factor": (0, 0.99),
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
    }

    @property
    def origin(self) -> str:
        """The checkpoint or the preset that the run starts from."""
        assert self.model is not None
        return self.model

    @property
    def validates(self) -> bool:
        """Whether there are validation rows: steps are evaluated on them, and the best is kept."""
        return self.validation is not None or self.validation_fraction > 0

    @classmethod
    def preset(cls, name: str | None) -> Mapping[str, Any]:
        """Return the options that a new model of the preset ``name`` trains well by."""
        return {}

    @classmethod
    def of_run(cls, facts: Any) -> Mapping[str, Any]:
        """Return the options that read the rows which a run with these facts has kept."""
        return {}

    def check(self) -> None:
        """Raise UsageError for the first value that makes no sense."""
        super().check()
        for name, (low, high) in self.ranges.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise UsageError(f"{flag(name)} is {value}", f"give a value from {low} to {high}")
        if not self.train:
            raise UsageError("--train is missing", "name the rows to train on")
        if self.early_stopping_patience and not self.validates:
            raise UsageError(
                "--early-stopping-patience needs validation rows, and --validation-fraction is 0",
                "give --validation, or leave --early-stopping-patience out",
            )


def flag(name: str) -> str:
    """A field as it is typed: ``max_length`` is ``--max-length``."""
    return f"--{name.replace('_', '-')}"


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
    """Write what ``read_toml`` reads back to equal options."""
    import tomli_w

    values = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(options).items()}
    path.write_text(tomli_w.dumps({k: v for k, v in values.items() if v is not None}), encoding="utf-8")


def option_names(kind: type[FinetuneOptions]) -> set[str]:
    return {field.name for field in dataclasses.fields(kind)}
