"""Measure every form of a model (precision and engine) on the same rows, and its loss against the checkpoint."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

import numpy as np

from deploykit.bootstrap import Measure, differences, intervals
from deploykit.errors import ExportError
from deploykit.metric_titles import POINTS, points_of, title_of

BROKEN = 1e9
"""Points lost by a form whose metric is no number, or a change of outputs that are none. Finite, so that a search can sort it and
continue, and JSON can hold it."""


class _Rows(Protocol):
    def __len__(self) -> int: ...


Raw = TypeVar("Raw", bound=_Rows)


@dataclass(frozen=True)
class Line:
    """A row of the accuracy table.

    ``agreement`` is the share of rows with the same answer as the checkpoint's; ``limited`` names the metrics that
    ``--max-drop`` limits. ``intervals`` of the figures, and ``differences`` from the checkpoint (``deploykit.bootstrap``), are
    empty where rows were not weighed.
    """

    precision: str
    engine: str
    figures: Mapping[str, float]
    agreement: float
    int8_kernels: int
    limited: tuple[str, ...] = tuple(POINTS)
    intervals: Mapping[str, Sequence[float]] = field(default_factory=dict)
    differences: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {
            "precision": self.precision,
            "engine": self.engine,
            **self.figures,
            "agreement": self.agreement,
            "int8_kernels": self.int8_kernels,
            "intervals": dict(self.intervals),
            "differences": dict(self.differences),
        }

    @property
    def judged(self) -> dict[str, float]:
        """The metrics that ``--max-drop`` limits."""
        return {name: value for name, value in self.figures.items() if name in self.limited}


class Grader(ABC, Generic[Raw]):
    """Builds the accuracy table.

    ``table`` has a line for the checkpoint, which comes first, and for each other form; ``metrics`` has all their
    metrics. ``Raw`` is the output of a form of the model for the rows, one by one.
    """

    figures: tuple[str, ...]
    """The metrics shown in the table."""
    limited: tuple[str, ...] = tuple(POINTS)
    """The metrics among them that ``--max-drop`` limits."""

    def __init__(self) -> None:
        self._lines: dict[str, Line] = {}
        self._expected: Sequence[str] = ()
        self._reference_measure: Measure | None = None
        self.metrics: dict[str, Any] = {}

    @abstractmethod
    def measure(self, raw: Raw) -> dict[str, Any]:
        """Return all metrics of an output."""

    @abstractmethod
    def answers(self, raw: Raw) -> Sequence[str]:
        """Return the answer for each row."""

    def measure_of(self, raw: Raw) -> Measure | None:
        """Return the metrics of an output as functions of the rows' weights. Optional for a grader."""
        return None

    @property
    def table(self) -> list[Line]:
        return list(self._lines.values())

    @property
    def judged(self) -> str:
        """Names of the limited metrics, for messages."""
        return " or ".join(title_of(name) for name in self.table[0].judged)

    def enter(self, precision: str, engine: str, raw: Raw, kernels: int = 0) -> Line:
        metrics, answers = self.measure(raw), self.answers(raw)
        measure = self.measure_of(raw)
        if not self._lines:
            self._expected, self._reference_measure = answers, measure
        agreement = float(np.mean([a == b for a, b in zip(answers, self._expected)]))
        line = Line(
            precision, engine, {name: metrics[name] for name in self.figures}, agreement, kernels, self.limited,
            self._shown(intervals(measure, len(raw))) if measure is not None else {},
            self._shown(differences(measure, self._reference_measure, len(raw)))
            if measure is not None and self._reference_measure is not None and self._lines else {},
        )  # fmt: skip
        key = f"{engine}-{precision}"
        self._lines[key], self.metrics[key] = line, metrics
        return line

    def _shown(self, found: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in found.items() if name in self.figures}

    def drop(self, line: Line) -> float:
        """Return the points lost against the checkpoint, in the metric that loses most."""
        reference = self.table[0].judged
        drops = [points_of(name) * (reference[name] - value) for name, value in line.judged.items()]
        return max(drop if math.isfinite(drop) else BROKEN for drop in drops)

    def refuse_loss(self, line: Line, name: str, max_drop: float, remedy: str) -> None:
        """Raise ExportError if ``name`` loses more than ``max_drop`` points."""
        if (drop := self.drop(line)) > max_drop:
            raise ExportError(
                f"{name} loses {drop:.2f} points of {self.judged}, more than --max-drop {max_drop}",
                f"{remedy}, or raise --max-drop; nothing was written",
            )
