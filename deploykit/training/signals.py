"""Handle Ctrl-C and SIGTERM while a run trains."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_USUAL: dict[int, Any] = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
"""Signal -> the handler that is replaced. Where a program has set another one, it stays."""


@contextmanager
def handled(handler: Callable[[int, Any], None]) -> Iterator[None]:
    """Call ``handler`` on Ctrl-C and SIGTERM in this block. Outside the main thread nothing can be replaced."""
    main = threading.current_thread() is threading.main_thread()
    replaced = [number for number, usual in _USUAL.items() if main and signal.getsignal(number) is usual]
    for number in replaced:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number in replaced:
            signal.signal(number, _USUAL[number])
