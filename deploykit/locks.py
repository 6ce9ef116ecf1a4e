"""Lock a file against other processes, on Linux, macOS and Windows."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # On Windows others cannot read locked bytes: lock one behind the content
    import msvcrt

    _BEHIND = 0x7FFF_0000
    _RETRY_S = 0.05

    def _take(descriptor: int) -> bool:
        place = os.lseek(descriptor, 0, os.SEEK_CUR)
        os.lseek(descriptor, _BEHIND, os.SEEK_SET)
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        except OSError:
            return False
        finally:
            os.lseek(descriptor, place, os.SEEK_SET)
        return True

    def lock(descriptor: int, *, wait: bool) -> bool:
        """Lock an open file until it is closed. Returns False if another has locked it and ``wait`` is False."""
        while not _take(descriptor):
            if not wait:
                return False
            time.sleep(_RETRY_S)
        return True

else:

    def lock(descriptor: int, *, wait: bool) -> bool:
        """Lock an open file until it is closed. Returns False if another has locked it and ``wait`` is False."""
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            return False
        return True


@contextlib.contextmanager
def unlocked(path: Path, flags: int = 0) -> Iterator[bool]:
    """Lock a file or folder that a living process may have locked. Yields whether it is this user's, no link, and was not locked.

    ``flags`` are those of ``os.open``. Folders cannot be locked on Windows, nor anything on some network file systems: False.
    """
    try:
        # A pipe would wait for its writer.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOFOLLOW", 0) | flags)
    except OSError:  # a link, another user's, or removed by another process
        yield False
        return
    try:
        try:
            found = os.fstat(descriptor).st_uid == os.geteuid() and lock(descriptor, wait=False)
        except OSError:
            found = False
        yield found
    finally:
        os.close(descriptor)
