"""End a training run on Ctrl-C or SIGTERM with a checkpoint from which the same command continues."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from deploykit.errors import Interrupted
from deploykit.signals import handled, unhandled
from deploykit.training import processes
from deploykit.training.rows import Say

# As in ``trainer``: the training of each task need not pass it on.
_running: ContextVar[Interruption | None] = ContextVar("interruption", default=None)


class Interruption(TrainerCallback):  # type: ignore[misc]
    """Finishes the current step or evaluation, saves a checkpoint, and raises. At other times, and at a second signal,
    it raises at once."""

    def __init__(self, say: Say) -> None:
        self._say = say
        self._in_steps = False
        self.signal = 0

    def handle(self, number: int, _: Any) -> None:
        again, self.signal = self.signal, number
        if again or not self._in_steps:
            raise KeyboardInterrupt
        self._say("interrupted: saving a checkpoint after this step (once more: end at once)")

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._in_steps = True

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._in_steps = False

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_save |= bool(self.signal)

    on_evaluate = on_step_end

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.signal:
            raise KeyboardInterrupt


@contextmanager
def interruptible(work: Path, say: Say) -> Iterator[None]:
    """Make an interrupted run in this block raise Interrupted, whose message says what is kept in ``work``.

    Of several processes (``accelerate launch``) none waits for a step, which needs the others.
    """
    interruption = Interruption(say)
    token = _running.set(interruption)
    try:
        with handled(interruption.handle, unhandled() if processes.count() == 1 else ()):
            try:
                yield
            except KeyboardInterrupt as error:
                kept = get_last_checkpoint(str(work / "trainer")) if (work / "trainer").is_dir() else None
                what = (
                    "interrupted before the first checkpoint: the same command starts over"
                    if kept is None
                    else f"interrupted: the same command continues from step {int(kept.rpartition('-')[2]):,} (--restart starts over)"
                )
                raise Interrupted(what, interruption.signal or signal.SIGINT) from error
    finally:
        _running.reset(token)


def interruption_callbacks() -> list[Any]:
    """Return the callback of the ``interruptible`` block that runs."""
    running = _running.get()
    return [] if running is None else [running]
