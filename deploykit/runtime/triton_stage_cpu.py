"""A Triton metric of the CPU time of each stage of an answer, which ``deploykit bench`` reads."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

import triton_python_backend_utils as pb_utils

from deploykit.runtime.tracing import stage_cpu_ns

_EVERY_S = 0.1
"""Seconds between reports: each report is a message to Triton, so not every batch sends one."""


class StageCpu:
    """Reports ``stage_cpu_ns`` of this process, which runs the model ``name``."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._family: Any = None
        self._metrics: dict[str, Any] = {}
        self._reported: Counter[str] = Counter()
        self._next = 0.0

    def report(self) -> None:
        """Report the time since the last report, if that is long enough ago."""
        if not stage_cpu_ns or (now := time.monotonic()) < self._next:
            return
        self._next = now + _EVERY_S
        for stage, spent in list(stage_cpu_ns.items()):
            if stage not in self._metrics:
                self._metrics[stage] = self._metric(stage)
            self._metrics[stage].increment((spent - self._reported[stage]) / 1e9)
            self._reported[stage] = spent

    def _metric(self, stage: str) -> Any:
        if self._family is None:  # kept, because its metrics die with it
            self._family = pb_utils.MetricFamily(
                name="deploykit_stage_cpu_seconds_total",
                description="CPU time of the stages of answers",
                kind=pb_utils.MetricFamily.COUNTER,
            )
        return self._family.Metric(labels={"model": self._name, "stage": stage})
