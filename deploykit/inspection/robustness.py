"""Measure rows unchanged, and with the typing noise of people and keyboards."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from random import Random
from typing import Any

from deploykit.data.noise import noisy

_MEASURED = {"typos": 0.2, "case": 1.0, "punctuation": 0.3}
"""Noise -> its rate."""
MOST_ROWS = 500
"""Maximum rows for models whose answers are texts, because they answer each row four times."""

Noisy = Callable[[str], str]


def robustness(
    clean: Mapping[str, Any], measured: Callable[[Noisy], Mapping[str, Any]], names: Sequence[str]
) -> list[dict[str, Any]]:
    """Return the metrics ``names`` with their intervals for clean rows and for each noise.

    ``clean`` are the metrics of the unchanged rows; ``measured`` takes a function that rewrites texts, and returns the metrics of
    the rewritten rows.
    """
    found = []
    for noise in ("clean", *_MEASURED):
        metrics = clean if noise == "clean" else measured(noisy(noise, _MEASURED[noise], Random(noise)))
        intervals = {name: metrics["intervals"][name] for name in names}
        found.append({"noise": noise, **{name: metrics[name] for name in names}, "intervals": intervals})
    return found
