"""Handle Ctrl-C and SIGTERM for a while."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

STOPPING = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def handled(handler: Callable[[int, Any], None], numbers: Sequence[int] = STOPPING) -> Iterator[None]:
    """Call ``handler`` on the signals ``numbers`` in this block. The handlers before it are set again at its end."""
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


def unhandled() -> list[int]:
    """The signals of STOPPING that no program handles or ignores. None outside the main thread, which sets handlers."""
    if threading.current_thread() is not threading.main_thread():
        return []
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    return [number for number in STOPPING if signal.getsignal(number) is usual[number]]
