"""Settings with which Triton runs a model, as config.pbtxt records them."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal, get_args

from deploykit.errors import UsageError

LongInput = Literal["split", "refuse"]
"""How to handle a text that is too long for the model: split it at sentence ends, or refuse it."""
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

    For all tasks:

    - ``max_batch_size``: maximum rows of a batch.
    - ``instances``: model processes; None for the task's default (classification 2, translation 1).
    - ``threads``: CPU threads per instance; 0: the instances share twice the CPUs.
    - ``max_queue_size``: maximum waiting requests (classification) or sentences (translation).

    For classification:

    - ``token_budget``: maximum rows x padded length of one run of the engine; 0 for the engine's own.
    - ``preferred_batch_size``: size of a batch when more rows are waiting; 0 for all, up to ``max_batch_size``.

    For translation:

    - ``max_rows``: maximum texts x beams of a decode step.
    - ``max_cache_mb``: maximum memory of their keys and values, in MiB.
    - ``long_input``: how to handle a text that is too long for the model.
    - ``in_flight``: let requests join the running batch; otherwise they wait until it is done.

    Raises UsageError for a value out of range.
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
    max_cache_mb: int = 512
    long_input: LongInput = "split"
    in_flight: bool = True

    def __post_init__(self) -> None:
        if self.long_input not in get_args(LongInput):
            raise UsageError(f"long_input is {self.long_input!r}", f"choose one of: {', '.join(get_args(LongInput))}")
        for setting in fields(self):
            value = getattr(self, setting.name)
            least = 0 if setting.name in _MAY_BE_ZERO else 1
            if isinstance(value, int) and value < least:
                raise UsageError(f"{setting.name} is {value}", f"make it {least} or more")
