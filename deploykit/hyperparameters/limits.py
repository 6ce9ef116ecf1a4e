"""Say which limits of a search a run exceeds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

UNITS: Mapping[str, str] = {"size_mb": "MB", "p50_ms": "ms at p50"}
"""Limit -> its unit."""


def ruled_out(run: Mapping[str, Any], limits: Mapping[str, float | None]) -> list[str]:
    """Return why a finished run cannot be the best one: the limits that its export exceeds, or that it has no export."""
    if run.get("error"):
        return [f"no INT8 export: {run['error']}"]
    return [
        f"{run[name]:.1f} {UNITS[name]}, above the limit of {limit:g}"
        for name, limit in limits.items()
        if limit is not None and run.get(name) is not None and run[name] > limit
    ]
