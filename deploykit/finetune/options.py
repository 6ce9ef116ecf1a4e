"""Every choice of a fine-tuning run, with its default: the command line, the TOML file and the
manifest all hold exactly these."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploykit.errors import UsageError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@dataclass(frozen=True)
class FinetuneOptions:
    """Rates and fractions are of 1; lengths are tokens; 0 turns the optional ones off."""

    model: str
    train: str
    task: str = "classification"
    validation: str | None = None
    test: str | None = None
    text_column: tuple[str, ...] = ()
    label_column: str | None = None
    text_separator: str = " "
    multi_label: bool = False
    encoding: str | None = None
    validation_fraction: float = 0.1
    test_fraction: float = 0.1
    max_rows: int = 0
    max_length: int = 128
    epochs: float = 3.0
    max_steps: int = 0
    batch_size: int = 32
    accumulation: int = 1
    learning_rate: float = 5e-5
    optimizer: str = "adamw"
    schedule: str = "linear"
    warmup: float = 0.1
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    dropout: float | None = None
    label_smoothing: float = 0.0
    class_weights: str = "none"
    early_stopping: int = 0
    eval_steps: int = 0
    mixed_precision: str = "no"
    lora_rank: int = 0
    lora_alpha: int = 16
    seed: int = 0

    def check(self) -> None:
        """Raise UsageError for the first value that makes no sense."""
        for name, low, high in (
            ("validation_fraction", 0, 0.9),
            ("test_fraction", 0, 0.9),
            ("warmup", 0, 1),
            ("weight_decay", 0, 1),
            ("label_smoothing", 0, 0.99),
            ("dropout", 0, 0.99),
            ("learning_rate", 1e-12, 10),
            ("epochs", 1e-6, 1e6),
            ("max_steps", 0, 10**9),
            ("max_rows", 0, 10**12),
            ("max_length", 3, 100_000),
            ("batch_size", 1, 100_000),
            ("accumulation", 1, 100_000),
            ("early_stopping", 0, 10**6),
            ("eval_steps", 0, 10**9),
            ("lora_rank", 0, 4096),
            ("lora_alpha", 1, 65536),
            ("max_grad_norm", 0, 1e9),
        ):
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise UsageError(f"--{name.replace('_', '-')} is {value}", f"give a value from {low} to {high}")
        if self.multi_label and (self.label_smoothing or self.class_weights != "none"):
            raise UsageError(
                "--label-smoothing and --class-weights are for one label a text", "leave them out with --multi-label"
            )
        if self.validation_fraction == 0 and self.validation is None:
            raise UsageError("--validation-fraction is 0 and there is no --validation", "a run needs validation rows")


def read_toml(path: Path) -> dict[str, Any]:
    """Options from a TOML file, keys as in ``FinetuneOptions``. Raises UsageError naming a wrong key."""
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}", "check the path") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: is not TOML: {error}", "correct the file") from error
    fields = {f.name for f in dataclasses.fields(FinetuneOptions)}
    options = {key.replace("-", "_"): value for key, value in values.items()}
    for key in options:
        if key not in fields:
            raise UsageError(f"{path}: unknown option {key!r}", f"known options: {', '.join(sorted(fields))}")
    return options


def write_toml(options: FinetuneOptions, path: Path) -> None:
    """Write what ``read_toml`` reads back to equal options."""
    import tomli_w

    values = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(options).items()}
    path.write_text(tomli_w.dumps({k: v for k, v in values.items() if v is not None}), encoding="utf-8")
