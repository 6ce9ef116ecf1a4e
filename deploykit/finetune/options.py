"""Every choice of a fine-tuning run, with its default: the command line, the TOML file and the
manifest all hold exactly these."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from deploykit.artifacts import load_manifest
from deploykit.errors import UsageError
from deploykit.finetune.presets import PRESETS
from deploykit.tasks import Classification, Translation

if TYPE_CHECKING:
    from deploykit.export.calibration import Method

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@dataclass(frozen=True)
class FinetuneOptions:
    """What every run chooses. Rates and fractions are of 1; lengths are tokens; 0 turns the optional ones off."""

    model: str | None = None
    train: str = ""
    task: str = Classification.name
    validation: str | None = None
    test: str | None = None
    encoding: str | None = None
    validation_fraction: float = 0.1
    test_fraction: float = 0.1
    max_rows: int = 0
    max_length: int = 128
    epochs: float = 3.0
    max_steps: int = 0
    accumulation: int = 1
    learning_rate: float = 5e-5
    optimizer: str = "adamw"
    schedule: str = "linear"
    warmup: float = 0.1
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    dropout: float | None = None
    label_smoothing: float = 0.0
    early_stopping: int = 0
    eval_steps: int = 0
    mixed_precision: str = "no"
    lora_rank: int = 0
    lora_alpha: int = 16
    seed: int = 0

    # option -> lowest and highest value
    ranges: ClassVar[Mapping[str, tuple[float, float]]] = {
        "validation_fraction": (0, 0.9),
        "test_fraction": (0, 0.9),
        "warmup": (0, 1),
        "weight_decay": (0, 1),
        "label_smoothing": (0, 0.99),
        "dropout": (0, 0.99),
        "learning_rate": (1e-12, 10),
        "epochs": (1e-6, 1e6),
        "max_steps": (0, 10**9),
        "max_rows": (0, 10**12),
        "max_length": (3, 100_000),
        "accumulation": (1, 100_000),
        "early_stopping": (0, 10**6),
        "eval_steps": (0, 10**9),
        "lora_rank": (0, 4096),
        "lora_alpha": (1, 65536),
        "max_grad_norm": (0, 1e9),
    }

    @property
    def origin(self) -> str:
        """The checkpoint or the preset that the run starts from."""
        assert self.model is not None
        return self.model

    def check(self) -> None:
        """Raise UsageError for the first value that makes no sense."""
        for name, (low, high) in self.ranges.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise UsageError(f"{flag(name)} is {value}", f"give a value from {low} to {high}")
        if not self.train:
            raise UsageError("--train is missing", "name the rows to train on")
        if self.validation_fraction == 0 and self.validation is None:
            raise UsageError("--validation-fraction is 0 and there is no --validation", "a run needs validation rows")


@dataclass(frozen=True)
class ClassificationOptions(FinetuneOptions):
    """``qat``: go on training a classifier with its linear layers rounded to INT8, in ranges that start as calibrated
    by ``qat_method``."""

    text_column: tuple[str, ...] = ()
    label_column: str | None = None
    text_separator: str = " "
    multi_label: bool = False
    batch_size: int = 32
    class_weights: str = "none"
    qat: bool = False
    qat_method: Method = "minmax"

    ranges: ClassVar[Mapping[str, tuple[float, float]]] = {**FinetuneOptions.ranges, "batch_size": (1, 100_000)}

    def check(self) -> None:
        super().check()
        if self.model is None:
            raise UsageError("--model is missing", "give the folder of a checkpoint, or a hub id")
        if self.multi_label and (self.label_smoothing or self.class_weights != "none"):
            raise UsageError(
                "--label-smoothing and --class-weights are for one label a text", "leave them out with --multi-label"
            )
        if self.qat and self.lora_rank:
            raise UsageError("--qat trains the weights that are rounded, and --lora-rank others", "leave one out")
        if not self.qat and self.qat_method != type(self).qat_method:
            raise UsageError("--qat-method is for --qat", "add --qat, or leave it out")


@dataclass(frozen=True)
class TranslationOptions(FinetuneOptions):
    """``batch_tokens`` bounds a batch's padded tokens, on its longer side, unless one row has more; ``beam`` None is
    the checkpoint's own."""

    task: str = Translation.name
    source: str = ""
    target: str = ""
    source_column: str | None = None
    target_column: str | None = None
    from_config: str | None = None
    vocabulary: int = 0
    batch_tokens: int = 2048
    label_smoothing: float = 0.1
    beam: int | None = None
    eval_rows: int = 256
    held_out_rows: int = 1000

    ranges: ClassVar[Mapping[str, tuple[float, float]]] = {
        **FinetuneOptions.ranges,
        "vocabulary": (0, 1_000_000),
        "batch_tokens": (16, 10_000_000),
        "beam": (1, 64),
        "eval_rows": (1, 1_000_000),
        "held_out_rows": (1, 1_000_000_000),
    }

    @property
    def origin(self) -> str:
        return self.model or self.from_config or ""

    def check(self) -> None:
        super().check()
        if (self.model is None) == (self.from_config is None):
            raise UsageError(
                "--model and --from-config are both given"
                if self.model
                else "neither --model nor --from-config is given",
                f"give one: a checkpoint to fine-tune, or {', '.join(PRESETS)} to train from nothing",
            )
        if self.from_config is not None and self.from_config not in PRESETS:
            raise UsageError(f"--from-config {self.from_config}: there is none", f"give one of {', '.join(PRESETS)}")
        for name in ("source", "target"):
            if not getattr(self, name):
                raise UsageError(f"--{name} is missing", "give the language's code, such as en")
        if self.source == self.target:
            raise UsageError(f"--source and --target are both {self.source}", "translate into another language")
        if self.model is not None and self.vocabulary:
            raise UsageError("--vocabulary is for --from-config", "leave it out: a checkpoint has its own")
        if self.from_config is not None and self.lora_rank:
            raise UsageError("--lora-rank is for --model", "leave it out: with --from-config all weights are new")


OPTIONS: Mapping[str, type[ClassificationOptions] | type[TranslationOptions]] = {
    Classification.name: ClassificationOptions,
    Translation.name: TranslationOptions,
}


def make_options(given: Mapping[str, Any]) -> ClassificationOptions | TranslationOptions:
    """The options of a run from those that were named; the rest are the task's and the preset's defaults.

    Raises UsageError for an option of another task.
    """
    kind = OPTIONS[given.get("task", Classification.name)]
    for name in given:
        if name not in _names(kind):
            owner = next(task for task, other in OPTIONS.items() if name in _names(other))
            raise UsageError(f"{flag(name)} is for --task {owner}", "leave it out")
    preset = PRESETS.get(given.get("from_config") or "")
    return kind(**{**(preset.training if preset else {}), **given})


def with_rows_of_run(given: Mapping[str, Any]) -> dict[str, Any]:
    """``given``, where it names no rows and quantization-aware training goes on from a run of deploykit's, with the rows
    of that run as it split them: none that it was trained on is held out."""
    run = Path(given.get("model", ""))
    splits = {name: run / "splits" / f"{name}.jsonl" for name in ("train", "validation", "test")}
    if not given.get("qat") or {*splits} & {*given} or not splits["train"].is_file():
        return dict(given)
    task = load_manifest(run, "checkpoint", verify=False).task
    if not isinstance(task, Classification):
        raise UsageError(
            f"--qat is for --task {Classification.name}, and {run} was made for {task.name}", "leave it out"
        )
    rows = {name: str(path) for name, path in splits.items() if path.is_file()}
    own = {
        "text_column": ("text",),
        "label_column": "label",
        "encoding": "utf-8",
        "multi_label": task.multi_label,
        "max_length": task.max_length,
        "test_fraction": 0.0,  # none of the rows that the run was trained on
    }
    return {**own, **given, **rows}


def flag(name: str) -> str:
    """A field as it is typed: ``max_length`` is ``--max-length``."""
    return f"--{name.replace('_', '-')}"


def read_toml(path: Path) -> dict[str, Any]:
    """Options from a TOML file, keys as in the dataclasses. Raises UsageError naming a wrong key."""
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}", "check the path") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: is not TOML: {error}", "correct the file") from error
    known = {name for kind in OPTIONS.values() for name in _names(kind)}
    options = {key.replace("-", "_"): value for key, value in values.items()}
    for key in options:
        if key not in known:
            raise UsageError(f"{path}: unknown option {key!r}", f"known options: {', '.join(sorted(known))}")
    return options


def write_toml(options: FinetuneOptions, path: Path) -> None:
    """Write what ``read_toml`` reads back to equal options."""
    import tomli_w

    values = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(options).items()}
    path.write_text(tomli_w.dumps({k: v for k, v in values.items() if v is not None}), encoding="utf-8")


def _names(kind: type[FinetuneOptions]) -> set[str]:
    return {field.name for field in dataclasses.fields(kind)}
