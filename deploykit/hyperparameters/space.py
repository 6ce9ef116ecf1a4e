"""Define the search space: the options to search, and their values."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploykit.data.reading import Reading, flag
from deploykit.errors import UsageError
from deploykit.training.options import FinetuneOptions, option_names
from deploykit.training.rows import absolute

if TYPE_CHECKING:
    from optuna import Trial

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_ROWS = frozenset({"task", "train", "validation", "test", *(field.name for field in dataclasses.fields(Reading))})
"""Options that select rows: runs on different rows cannot be compared."""
_LIST_OR_RANGE = "write a list of values, or a table: { low = 1e-5, high = 1e-3, log = true }"
_BATCH_SIZES = (8, 16, 32, 64)


@dataclass(frozen=True)
class Range:
    """Numbers from ``low`` to ``high``, both included; ``log``: each order of magnitude is as likely."""

    low: float
    high: float
    log: bool = False
    step: float | None = None
    integer: bool = False

    @property
    def bounds(self) -> tuple[Any, ...]:
        return self.low, self.high

    def suggest(self, trial: Trial, name: str) -> Any:
        if self.integer:
            return trial.suggest_int(name, int(self.low), int(self.high), step=int(self.step or 1), log=self.log)
        return trial.suggest_float(name, self.low, self.high, step=self.step, log=self.log)

    def contains(self, value: Any) -> bool:
        return isinstance(value, int | float) and self.low <= value <= self.high


@dataclass(frozen=True)
class Values:
    """A list of values, without an order."""

    values: tuple[Any, ...]

    @property
    def bounds(self) -> tuple[Any, ...]:
        return self.values

    def suggest(self, trial: Trial, name: str) -> Any:
        return trial.suggest_categorical(name, self.values)

    def contains(self, value: Any) -> bool:
        return value in self.values


Space = Mapping[str, Range | Values]
"""Option -> the values to try."""


def default_space(options: FinetuneOptions) -> Space:
    """Return the space around ``options`` that is searched without ``--search-space``."""
    space: dict[str, Range | Values] = {
        "learning_rate": Range(options.learning_rate / 10, options.learning_rate * 10, log=True),
        "warmup_ratio": Range(0.0, max(0.2, options.warmup_ratio)),
        "weight_decay": Range(0.0, max(0.1, options.weight_decay)),
    }
    if not options.max_steps:
        epochs = options.num_train_epochs
        whole = epochs == int(epochs)
        space["num_train_epochs"] = Range(min(1.0, epochs), max(2.0, 2 * epochs), step=1.0 if whole else None)
    if (batch := getattr(options, "per_device_train_batch_size", None)) is not None:
        space["per_device_train_batch_size"] = Values(tuple(sorted({*_BATCH_SIZES, batch})))
    return space


def read_space(source: str | Path | Mapping[str, Any], options: FinetuneOptions) -> Space:
    """Read a space from a TOML file, or from the same as a mapping. Raises UsageError that names the file and the key."""
    if isinstance(source, Mapping):
        where, values = "search_space", dict(source)
    else:
        where = str(source)
        try:
            values = tomllib.loads(Path(source).read_text(encoding="utf-8"))
        except OSError as error:
            raise UsageError(f"{where}: cannot be read: {error.strerror}", "check the path") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise UsageError(f"{where}: is not TOML: {error}", "correct the file") from error
    if not values:
        raise UsageError(
            f"{where}: names no option to search", "write one: learning_rate = { low = 1e-5, high = 1e-3 }"
        )
    return {name: _entry(where, name, entry, options) for name, entry in
            ((key.replace("-", "_"), value) for key, value in values.items())}  # fmt: skip


def starting_values(space: Space, options: FinetuneOptions) -> dict[str, Any]:
    """Return the values of ``options``, as the first run to try; values outside the space are left out."""
    values = {name: getattr(options, name) for name in space}
    return {name: value for name, value in values.items() if space[name].contains(value)}


def _entry(where: str, name: str, entry: Any, options: FinetuneOptions) -> Range | Values:
    where = f"{where}: {name}"
    if name not in option_names(type(options)):
        raise UsageError(
            f"{where} is not an option of --task {options.task}", "see deploykit finetune --help; write learning_rate"
        )
    if name in _ROWS or isinstance(getattr(options, name), tuple):
        raise UsageError(f"{where} selects rows, and runs on different rows cannot be compared", "leave it out")
    if isinstance(entry, list | tuple) and entry:
        values = tuple(absolute(value) if name == "model" and isinstance(value, str) else value for value in entry)
        found: Range | Values = Values(values)
    elif isinstance(entry, Mapping):
        found = _range(where, name, entry, _kind(options, name))
    else:
        raise UsageError(f"{where} is {entry!r}", _LIST_OR_RANGE)
    for value in found.bounds:
        if not _fits(value, options, name):
            raise UsageError(f"{where} has {value!r}, and {flag(name)} is of type {_kind(options, name)}", "correct it")
        try:
            dataclasses.replace(options, **{name: value}).check()
        except UsageError as error:
            raise UsageError(f"{where} has {value!r}: {error.message}", error.remedy) from error
    return found


def _range(where: str, name: str, entry: Mapping[str, Any], kind: str) -> Range:
    if unknown := sorted({*entry} - {"low", "high", "log", "step"}):
        raise UsageError(f"{where} has an unknown key {unknown[0]!r}", "known: low, high, log, step")
    if kind not in ("int", "float"):
        raise UsageError(f"{where} is a range, and {flag(name)} is of type {kind}", "write a list of values")
    low, high, step, log = entry.get("low"), entry.get("high"), entry.get("step"), entry.get("log", False)
    numbers = [value for value in (low, high, step) if value is not None]
    if low is None or high is None or not all(isinstance(n, int | float) and not isinstance(n, bool) for n in numbers):
        raise UsageError(f"{where} needs two numbers, low and high", _LIST_OR_RANGE)
    if not isinstance(log, bool) or low >= high or (log and (low <= 0 or step is not None)) or (step or 1) <= 0:
        raise UsageError(
            f"{where} is {dict(entry)}", "give low below high, a step above 0, and with log a low above 0 and no step"
        )
    integer = kind == "int"
    if integer and any(n != int(n) for n in numbers):
        raise UsageError(f"{where} is {dict(entry)}, and {flag(name)} is a whole number", "give whole numbers")
    return Range(low if integer else float(low), high if integer else float(high), log, step, integer)


def _kind(options: FinetuneOptions, name: str) -> str:
    field = next(field for field in dataclasses.fields(options) if field.name == name)
    return "bool" if isinstance(field.default, bool) else str(field.type).partition(" ")[0]


def _fits(value: Any, options: FinetuneOptions, name: str) -> bool:
    kinds: Mapping[str, type | tuple[type, ...]] = {"int": int, "float": (int, float), "bool": bool, "str": str}
    kind = _kind(options, name)
    if kind not in kinds:
        return isinstance(value, str)  # a name of its own for a few strings
    return isinstance(value, kinds[kind]) and (kind == "bool") == isinstance(value, bool)
