"""Restore the stack on which a thread handles signals."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_DISABLED = 2


class _Stack(ctypes.Structure):
    """``stack_t`` of sigaltstack(2) on Linux."""

    _fields_ = (("place", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))


@contextmanager
def kept_signal_stack() -> Iterator[None]:
    """Restore this thread's stack for signals at the end of the block.

    On a CPU with AMX, OpenVINO sets a stack for each model, and frees it with the model. If a model is freed before a later
    one, the thread keeps a stack that was freed, and the next Ctrl-C ends the process (SIGSEGV).
    """
    if not sys.platform.startswith("linux"):
        yield
        return
    library, before = ctypes.CDLL(None), _Stack()
    library.sigaltstack(None, ctypes.byref(before))
    try:
        yield
    finally:
        if library.sigaltstack(ctypes.byref(before), None) != 0:  # too small for AMX registers
            library.sigaltstack(ctypes.byref(_Stack(None, _DISABLED, 0)), None)
