"""Describe the CPU that this process runs on."""

from __future__ import annotations

import os
import platform
from pathlib import Path


def cpu_name() -> str:
    """The model of the CPU, or at least its kind."""
    return first_cpu().get("model name") or platform.processor() or platform.machine()


def first_cpu() -> dict[str, str]:
    """The first CPU of /proc/cpuinfo (Linux; elsewhere empty)."""
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.partition(":") for line in first.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def available_cpus() -> int:
    """CPUs that this process may use (its affinity, as set by taskset or a container)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads_of_each(instances: int) -> int:
    """CPU threads of each of so many processes of a model, unless somebody says otherwise: twice the CPUs among them,
    because while one packs its answers, another may use them all."""
    return min(available_cpus(), max(1, 2 * available_cpus() // instances))
