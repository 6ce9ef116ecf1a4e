"""Define the search parameters of a sequence, and those that a request may change."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from deploykit.errors import UsageError

MAX_ROWS = 64
"""Default for the rows (sentences x beams) that are decoded at once; a packaged model's config may set another."""

PARAMETERS = (
    "num_beams",
    "max_new_tokens",
    "min_new_tokens",
    "length_penalty",
    "early_stopping",
    "no_repeat_ngram_size",
    "repetition_penalty",
)
"""Request parameters and command line options. The other fields of ``Generation`` come from the checkpoint."""
RENAMED = {"beam_size": "num_beams"}
"""Earlier names of parameters, which clients may still send -> current names."""


@dataclass(frozen=True)
class Generation:
    """The fields of a Hugging Face generation config that deploykit's decoding supports.

    ``max_length`` and ``min_length`` count target tokens as Hugging Face does, with the start token. ``bad_words`` are
    token sequences that must not be completed; ``suppressed`` are tokens that must not occur. ``renormalize``:
    probabilities of the allowed tokens add up to 1 (opus-mt has it). ``early_stopping`` is True, False or "never"
    (Hugging Face documentation, "GenerationConfig").
    """

    beam_size: int = 1
    max_length: int = 512
    min_length: int = 0
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    no_repeat_ngram_size: int = 0
    repetition_penalty: float = 1.0
    bad_words: tuple[tuple[int, ...], ...] = ()
    suppressed: tuple[int, ...] = ()
    forced_bos_token_id: int | None = None
    forced_eos_token_id: int | None = None
    renormalize: bool = False


class DecodedTask(Protocol):
    """The facts of a task that decoding needs. Lengths count tokens; ids are those of the vocabulary."""

    @property
    def vocabulary(self) -> int: ...

    @property
    def max_target_length(self) -> int: ...

    @property
    def eos_token_ids(self) -> tuple[int, ...]: ...

    @property
    def decoder_start_token_id(self) -> int: ...

    @property
    def generation(self) -> Generation: ...


def override(task: DecodedTask, given: Mapping[str, Any], *, max_beams: int = MAX_ROWS) -> Generation:
    """Return the task's generation config with the ``given`` parameters replaced.

    Raises UsageError naming the first parameter that is unknown or out of range.
    """
    changes: dict[str, Any] = {}
    for name, value in given.items():
        parameter = RENAMED.get(name, name)
        if parameter not in PARAMETERS:
            raise UsageError(f"unknown parameter {name}", f"known ones: {', '.join(PARAMETERS)}")
        if parameter == "num_beams":
            changes["beam_size"] = _whole(name, value, 1, min(max_beams, task.vocabulary // 4))
        elif name == "max_new_tokens":
            changes["max_length"] = 1 + _whole(name, value, 1, task.max_target_length - 1)
        elif name == "min_new_tokens":
            changes["min_length"] = 1 + _whole(name, value, 0, task.max_target_length - 1)
        elif name == "no_repeat_ngram_size":
            changes[name] = _whole(name, value, 0, task.max_target_length)
        elif name == "length_penalty":
            changes[name] = _number(name, value, -10.0, 10.0)
        elif name == "repetition_penalty":
            changes[name] = _number(name, value, 0.01, 100.0)
        elif value in (True, False, "never", "true", "false"):
            changes[name] = {"true": True, "false": False}.get(value, value) if isinstance(value, str) else value
        else:
            raise UsageError(f"{name} is {value!r}", 'give true, false or "never"')
    generation = dataclasses.replace(task.generation, **changes)
    if generation.min_length > generation.max_length:
        raise UsageError(
            f"min_new_tokens is {generation.min_length - 1}, above max_new_tokens, {generation.max_length - 1}",
            "lower min_new_tokens, or raise max_new_tokens",
        )
    return generation


def _whole(name: str, value: Any, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise UsageError(f"{name} is {value!r}", f"give a whole number from {low} to {high}")
    return value


def _number(name: str, value: Any, low: float, high: float) -> float:
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not math.isfinite(value)
        or not low <= value <= high
    ):
        raise UsageError(f"{name} is {value!r}", f"give a number from {low:g} to {high:g}")
    return float(value)
