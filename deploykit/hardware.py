"""Describe the CPU that this process runs on."""

from __future__ import annotations

import os
import platform
from pathlib import Path


def cpu_name() -> str:
    """Return the CPU's model, or at least its architecture."""
    return first_cpu().get("model name") or platform.processor() or platform.machine()


def first_cpu() -> dict[str, str]:
    """Return the first CPU's entry in /proc/cpuinfo (empty except on Linux)."""
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.partition(":") for line in first.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def available_cpus() -> int:
    """Return the number of CPUs this process may use (its affinity, as set by taskset or a container)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads_of_each(instances: int) -> int:
    """Return the default CPU threads of each of ``instances`` model processes: together twice the CPUs.

    While one process assembles its answers, another can then use all CPUs.
    """
    return min(available_cpus(), max(1, 2 * available_cpus() // instances))
