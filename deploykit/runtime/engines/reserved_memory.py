"""Reserve arrays for the longest texts; their memory is allocated page by page when it is written."""

from __future__ import annotations

import mmap
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deploykit.errors import EngineError

_NO_RESERVE = 0x4000  # Linux's MAP_NORESERVE, which Python's mmap names from 3.11 on


class ReservedArray:
    """``view``: an array of ``shape``, zeros until written. Raises EngineError if there is no address space for it."""

    def __init__(self, shape: tuple[int, ...], dtype: Any) -> None:
        length = max(1, int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize)
        try:
            self._memory = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE)
        except OSError as error:
            raise EngineError(
                f"{length / 1e9:.1f} GB of address space for caches cannot be reserved: {error}",
                "lower --max-num-seqs or --max-cache-mb, or allow overcommit (vm.overcommit_memory 0 or 1)",
            ) from error
        self.view: NDArray[Any] = np.frombuffer(self._memory, dtype).reshape(shape)

    def give_back(self, start: int, end: int) -> None:
        """Release the whole pages of the bytes ``start`` to ``end`` to the system; they read as zeros again."""
        begin = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
        length = end // mmap.PAGESIZE * mmap.PAGESIZE - begin
        if length > 0:
            self._memory.madvise(mmap.MADV_DONTNEED, begin, length)
