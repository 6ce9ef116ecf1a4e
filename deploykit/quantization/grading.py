"""Measure every form of a model (precision and engine) on the same rows, and its loss against the checkpoint."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
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
    empty where rows were not weighed. ``without_labels`` measures the points lost by ``Grader.label_free``. Call it before the
    form is written again.
    """

    precision: str
    engine: str
    figures: Mapping[str, float]
    agreement: float
    int8_kernels: int
    limited: tuple[str, ...] = tuple(POINTS)
    intervals: Mapping[str, Sequence[float]] = field(default_factory=dict)
    differences: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    without_labels: Callable[[], float] | None = field(default=None, compare=False, repr=False)

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


@dataclass(frozen=True)
class Loss:
    """The points that a form loses, and the measure that found them. ``unresolved`` says why the metric could not decide; it is
    empty if it could."""

    points: float
    measure: str
    unresolved: str = ""

    def __str__(self) -> str:
        return f"{self.points:.2f} points of {self.measure}"


class Grader(ABC, Generic[Raw]):
    """Builds the accuracy table.

    ``table`` has a line for the checkpoint, which comes first, and for each other form; ``metrics`` has all their
    metrics. ``Raw`` is the output of a form of the model for the rows, one by one.
    """

    figures: tuple[str, ...]
    """The metrics shown in the table."""
    limited: tuple[str, ...] = tuple(POINTS)
    """The metrics among them that ``--max-drop`` limits."""
    label_free: str = ""
    """A measure of the points lost that needs no labels, so has less noise. It decides where the rows are too few for a metric."""

    def __init__(self) -> None:
        self._row_count = 0
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

    def enter(
        self, precision: str, engine: str, raw: Raw, kernels: int = 0, without_labels: Callable[[], float] | None = None,
    ) -> Line:  # fmt: skip
        metrics, answers = self.measure(raw), self.answers(raw)
        measure = self.measure_of(raw)
        if not self._lines:
            self._expected, self._reference_measure = answers, measure
            self._row_count = 0 if measure is None else len(raw)
        agreement = float(np.mean([a == b for a, b in zip(answers, self._expected)]))
        line = Line(
            precision, engine, {name: metrics[name] for name in self.figures}, agreement, kernels, self.limited,
            self._shown(intervals(measure, len(raw))) if measure is not None else {},
            self._shown(differences(measure, self._reference_measure, len(raw)))
            if measure is not None and self._reference_measure is not None and self._lines else {},
            without_labels,
        )  # fmt: skip
        key = f"{engine}-{precision}"
        self._lines[key], self.metrics[key] = line, metrics
        return line

    def _shown(self, found: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in found.items() if name in self.figures}

    def drop(self, line: Line) -> float:
        """Return the points lost against the checkpoint, in the metric that loses most."""
        return max(self._lost(line).values())

    def _lost(self, line: Line) -> dict[str, float]:
        """Return the points lost against the checkpoint in each limited metric."""
        reference = self.table[0].judged
        drops = {name: points_of(name) * (reference[name] - value) for name, value in line.judged.items()}
        return {name: drop if math.isfinite(drop) else BROKEN for name, drop in drops.items()}

    def loss(self, line: Line, limit: float) -> Loss:
        """Return the points that count against ``limit``.

        The metric decides if its paired interval is within the limit, or if the loss is above the limit and beyond noise. If
        neither holds, the rows are too few, and ``label_free`` decides where the task has it.
        """
        lost = self._lost(line)
        drop = max(lost.values())
        measured = Loss(drop, self.judged)
        bounds = {
            name: sorted(-points_of(name) * bound for bound in line.differences[name]["interval"])
            for name in line.judged
            if name in line.differences
        }
        if drop == BROKEN or len(bounds) < len(line.judged):
            return measured
        if any(lost[name] > limit and low > 0 for name, (low, _) in bounds.items()):
            return measured
        if all(high <= limit for _, high in bounds.values()):
            return measured
        worst = max(lost, key=lambda name: lost[name])
        low, high = bounds[worst]
        unresolved = (
            f"{self._row_count:,} rows cannot resolve --max-drop {limit:g}: it loses {drop:.2f} points of {title_of(worst)} with a 95 % "
            f"interval of {low:.2f} to {high:.2f}"
        )
        if line.without_labels is None:
            return Loss(
                drop, self.judged, f"{unresolved}. The measured loss counts; more rows (--data) narrow the interval"
            )
        points = line.without_labels()
        points = points if math.isfinite(points) else BROKEN
        return Loss(points, self.label_free, f"{unresolved}. It is decided by {self.label_free}: {points:.2f} points")

    def judge(self, line: Line, name: str, limit: float, say: Callable[[str], None]) -> Loss:
        """Return the ``loss`` of ``name``, and say why if the metric could not decide."""
        loss = self.loss(line, limit)
        if loss.unresolved:
            say(f"{name}: {loss.unresolved}")
        return loss

    def refuse_loss(self, line: Line, name: str, max_drop: float, remedy: str, say: Callable[[str], None]) -> None:
        """Raise ExportError if ``name`` loses more than ``max_drop`` points."""
        loss = self.judge(line, name, max_drop, say)
        if loss.points > max_drop:
            raise ExportError(
                f"{name} loses {loss}, more than --max-drop {max_drop}",
                f"{remedy}, or raise --max-drop; nothing was written",
            )
