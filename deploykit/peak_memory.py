"""Measure the peak memory of processes."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from deploykit.errors import MissingDependencyError

BENCH_EXTRA = "pip install 'deploykit[bench]'"


_SAMPLE_S = 0.05


def require_psutil() -> Any:
    """Return the psutil module. Raises MissingDependencyError."""
    try:
        import psutil
    except ImportError:
        raise MissingDependencyError("psutil, which measures memory and load, is not installed", BENCH_EXTRA) from None
    return psutil


class PeakMemory:
    """Records the highest sum of the processes' resident memory during the block, sampled every 50 ms.

    ``processes`` None means this process; an empty list leaves ``peak_mb`` None. Pages that processes share (Triton's
    shared memory) count in each of them.
    """

    def __init__(self, processes: Sequence[Any] | None) -> None:
        self._processes = [require_psutil().Process()] if processes is None else list(processes)
        self._peak = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="peak-memory", daemon=True)

    @property
    def peak_mb(self) -> float | None:
        """The peak, in 1e6 bytes."""
        return self._peak / 1e6 if self._peak else None

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while True:
            self._peak = max(self._peak, sum(_resident_bytes(p) for p in self._processes))
            if self._stop.wait(_SAMPLE_S):
                return


def _resident_bytes(process: Any) -> int:
    try:
        return int(process.memory_info().rss)
    except require_psutil().Error:  # the process has ended
        return 0
