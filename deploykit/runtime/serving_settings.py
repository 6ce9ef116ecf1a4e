"""Settings with which Triton runs a model, as config.pbtxt records them."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from typing import Literal, get_args

from deploykit.errors import UsageError

API_KEY_VARIABLE = "DEPLOYKIT_API_KEY"
"""Environment variable of the OpenAI port's key."""
DEFAULT_URL = "http://127.0.0.1:8000"
"""HTTP address of a server on this machine."""
LongInput = Literal["split", "refuse"]
"""How to handle a text that is too long for the model: split it at sentence ends, or refuse it."""
Split = Literal["sentence", "paragraph", "none"]
"""Pieces of a text that are translated one by one: its sentences, its lines, or the whole text."""
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*")
_MAY_BE_ZERO = (
    "threads",
    "token_budget",
    "preferred_batch_size",
    "max_queue_delay_us",
    "queue_timeout_us",
    "in_flight",
)


@dataclass(frozen=True)
class ServingSettings:
    """Settings with which Triton runs a model, as config.pbtxt records them. Times are in microseconds.

    Classification and question answering: ``token_budget`` limits rows x padded length of one run of the engine (0: the
    engine's default); ``preferred_batch_size`` is the batch size, the rest being left to another instance (0: up to
    ``max_batch_size``).

    Translation and text generation: ``max_rows`` limits the rows of one step (texts x beams, answers), ``max_cache_mb``
    (MiB) their keys and values. Translation: ``long_input`` and ``split`` are the model's defaults; without ``in_flight`` a text waits until the running batch is
    done.
    """

    max_batch_size: int = 64
    instances: int | None = None
    threads: int = 0
    token_budget: int = 0
    max_queue_delay_us: int = 0
    max_queue_size: int = 1024
    queue_timeout_us: int = 10_000_000
    preferred_batch_size: int = 0
    max_rows: int = 64
    max_cache_mb: int = 1024
    long_input: LongInput = "split"
    split: Split = "sentence"
    in_flight: bool = True

    def __post_init__(self) -> None:
        if self.long_input not in get_args(LongInput):
            raise UsageError(f"long_input is {self.long_input!r}", f"choose one of: {', '.join(get_args(LongInput))}")
        if self.split not in get_args(Split):
            raise UsageError(f"split is {self.split!r}", f"choose one of: {', '.join(get_args(Split))}")
        for setting in fields(self):
            value = getattr(self, setting.name)
            least = 0 if setting.name in _MAY_BE_ZERO else 1
            if isinstance(value, int) and value < least:
                raise UsageError(f"{setting.name} is {value}", f"make it {least} or more")


def check_name(name: str) -> None:
    """Raise UsageError unless ``name`` is valid as a folder and as a part of a URL."""
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"model name {name!r} is not allowed", "use only letters, digits, _ . and -, and do not begin with a dot"
        )
