"""Define the options of a hyperparameter search."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from deploykit.data.reading import flag
from deploykit.errors import UsageError
from deploykit.training.options import FinetuneOptions, described
from deploykit.units import parse_latency, parse_size, parse_time


@dataclass(frozen=True)
class SearchOptions:
    """Options of a search. ``search`` is 0 for a single run, without a search."""

    search: int = described(
        0, "Search hyperparameters: train this many runs, and write the run that is best on the validation rows."
    )
    search_space: str | Path | Mapping[str, Any] | None = described(
        None,
        "TOML file of the options to search: learning_rate = { low = 1e-5, high = 1e-3, log = true }, optimizer = "
        '["adamw", "sgd"] (default: learning rate, epochs, batch size, warm-up and weight decay).',
    )
    search_objective: str | None = described(
        None,
        "Metric of the validation rows to search for: accuracy, per_class.spam.f1 (default: the task's main metric).",
    )
    search_pruner: str = described(
        "median", "Rule that ends bad runs early, at an evaluation.", ("median", "hyperband", "none")
    )
    search_time: str | None = described(None, "Start no run after this time, such as 30m.")
    search_max_size: str | None = described(
        None, "Largest graph of a run's INT8 export, such as 30MB. Each run is exported to measure it."
    )
    search_max_p50: str | None = described(
        None,
        "Longest median latency of one row in a run's INT8 export, such as 5ms. Each run is exported to measure it.",
    )

    @property
    def max_size_mb(self) -> float | None:
        return None if self.search_max_size is None else parse_size("--search-max-size", self.search_max_size)

    @property
    def max_p50_ms(self) -> float | None:
        return None if self.search_max_p50 is None else parse_latency("--search-max-p50", self.search_max_p50)

    @property
    def time_s(self) -> float | None:
        return None if self.search_time is None else parse_time("--search-time", self.search_time)

    def check(self, options: FinetuneOptions) -> None:
        """Raise UsageError for the first value that does not fit the ``options`` of the runs."""
        if not self.search:
            for field in fields(self):
                if getattr(self, field.name) != field.default:
                    raise UsageError(f"{flag(field.name)} is for a search", "add --search N, or leave it out")
            return
        if not 1 <= self.search <= 100_000:
            raise UsageError(f"--search is {self.search}", "give a number of runs from 1 to 100,000")
        if self.search_pruner not in ("median", "hyperband", "none"):
            raise UsageError(f"--search-pruner is {self.search_pruner!r}", "choose one of: median, hyperband, none")
        if not options.validates:
            raise UsageError(
                "--search needs validation rows, and --validation-fraction is 0", "give --validation, or leave one out"
            )
        _ = self.max_size_mb, self.max_p50_ms, self.time_s  # raise UsageError for a wrong unit
