"""Coordinate several processes that train one model: those of ``finetune --processes``, ``accelerate launch`` and ``torchrun``."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def count() -> int:
    """Return how many processes train together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def number() -> int:
    """Return the number of this process among those that train together, from 0 on."""
    return int(os.environ.get("RANK", "0"))


def is_first() -> bool:
    """Return whether this process is the one that prints, measures and writes."""
    return number() == 0


@contextmanager
def first_alone() -> Iterator[None]:
    """Let the first process run this block before the others."""
    if count() == 1:
        yield
        return
    state = _state()
    if not is_first():
        state.wait_for_everyone()
    yield
    if is_first():
        state.wait_for_everyone()


def _state() -> Any:
    """Return the connection of the processes, which Trainer's arguments find."""
    import torch
    from accelerate import PartialState

    return PartialState(cpu=not torch.cuda.is_available())
