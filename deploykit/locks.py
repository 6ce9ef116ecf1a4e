"""Lock a file against other processes, on Linux, macOS and Windows."""

from __future__ import annotations

import os
import time

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
