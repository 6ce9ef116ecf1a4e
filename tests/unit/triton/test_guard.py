"""Functions of the guard that can be called without Triton."""

from __future__ import annotations

import ctypes
import errno
import subprocess
import sys

import pytest

from deploykit.triton.guard import LIBRARY

_WAIT = """
import ctypes, sys, time
guard, own = ctypes.CDLL(sys.argv[1]), ctypes.CDLL(None)
mutex, condition = ctypes.create_string_buffer(64), ctypes.create_string_buffer(64)  # zeros: as initialized
own.pthread_mutex_lock(mutex)
for seconds in map(float, sys.argv[2:]):
    until = time.monotonic() + seconds
    given = (ctypes.c_long * 2)(int(until), int(until % 1 * 1e9))
    print(guard.pthread_cond_clockwait(condition, mutex, time.CLOCK_MONOTONIC, given))
"""


pytestmark = pytest.mark.skipif(not LIBRARY.is_file(), reason="the guard was not built")

TRACEPARENT = b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def test_a_long_wait_ends_as_if_woken_and_a_short_one_with_its_timeout() -> None:
    """A thread of Triton that was not woken looks again whether requests wait."""
    done = subprocess.run(
        [sys.executable, "-c", _WAIT, LIBRARY, "3600", "0.001", "-1"], capture_output=True, text=True, timeout=60
    )
    assert done.stderr == ""
    assert done.stdout.split() == ["0", str(errno.ETIMEDOUT), str(errno.ETIMEDOUT)]


@pytest.mark.parametrize(
    ("text", "length"),
    [
        (TRACEPARENT, 55),
        (TRACEPARENT + b"a5\xe9", 55),  # bytes that happen to follow the header
        (TRACEPARENT[:-1], 54),
        (TRACEPARENT[:-1] + b"x and more", 64),
        (b"01" + TRACEPARENT[2:] + b"-more", 60),
        (b"", 0),
        (b"a" * 100, 100),
    ],
)
def test_a_traceparent_ends_where_its_form_ends(text: bytes, length: int) -> None:
    """Triton reads the header up to a zero byte, which gRPC does not put behind it."""
    assert ctypes.CDLL(str(LIBRARY)).strlen(text) == length
