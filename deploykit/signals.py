"""Handle Ctrl-C and SIGTERM for a while."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

STOPPING = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def restored(numbers: Sequence[int] = STOPPING) -> Iterator[None]:
    """Restore the handlers of the signals ``numbers`` at the end of this block. In the main thread only:
    other threads cannot set handlers."""
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                signal.signal(number, handler)


@contextmanager
def handled(handler: Callable[[int, Any], None], numbers: Sequence[int] = STOPPING) -> Iterator[None]:
    """Call ``handler`` on the signals ``numbers`` in this block."""
    with restored(numbers):
        for number in numbers:
            signal.signal(number, handler)
        yield


def ending() -> list[int]:
    """Return the signals that tell a server to end: STOPPING, and SIGHUP of a closed terminal unless nohup has it ignored."""
    return [*STOPPING, *([] if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else [signal.SIGHUP])]


def unhandled() -> list[int]:
    """Return the signals of STOPPING that are neither handled nor ignored; none outside the main thread, which sets handlers."""
    if threading.current_thread() is not threading.main_thread():
        return []
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    return [number for number in STOPPING if signal.getsignal(number) is usual[number]]
