"""The same rows through every form of a model: what each answers, and what it loses to the checkpoint."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np

from deploykit.errors import ExportError
from deploykit.metric_titles import TITLES

Raw = TypeVar("Raw")

POINTS: Mapping[str, float] = {"macro_f1": 100.0, "bleu": 1.0, "chrf": 1.0, "loss": -100.0}
"""The metrics that ``--max-drop`` limits, and how many points one of each is. The loss of a language model, the logarithm
of its perplexity, is better the lower it is: a point is a hundredth of it, 1 % of perplexity."""


@dataclass(frozen=True)
class Line:
    """One line of the accuracy table. ``agreement`` is the share of rows answered as the checkpoint answers them."""

    precision: str
    engine: str
    figures: Mapping[str, float]
    agreement: float
    int8_kernels: int

    def to_json(self) -> dict[str, Any]:
        return {
            "precision": self.precision,
            "engine": self.engine,
            **self.figures,
            "agreement": self.agreement,
            "int8_kernels": self.int8_kernels,
        }

    @property
    def judged(self) -> dict[str, float]:
        """Those of its metrics that ``--max-drop`` limits."""
        return {name: value for name, value in self.figures.items() if name in POINTS}


class Grader(ABC, Generic[Raw]):
    """``table`` has a line for the checkpoint, which comes first, and each other form; ``metrics`` all of their metrics.

    ``Raw`` is what a form of the model gives for the rows.
    """

    figures: ClassVar[tuple[str, ...]]
    """Of the metrics, those in the table."""

    def __init__(self) -> None:
        self._lines: dict[str, Line] = {}
        self._expected: Sequence[str] = ()
        self.metrics: dict[str, Any] = {}

    @abstractmethod
    def measure(self, raw: Raw) -> dict[str, Any]:
        """All metrics of what a form of the model gave."""

    @abstractmethod
    def answers(self, raw: Raw) -> Sequence[str]:
        """What it says, row by row."""

    @property
    def table(self) -> list[Line]:
        return list(self._lines.values())

    @property
    def judged(self) -> str:
        """The metrics that ``drop`` is of, for people."""
        return " or ".join(TITLES[name] for name in self.table[0].judged)

    def enter(self, precision: str, engine: str, raw: Raw, kernels: int = 0) -> Line:
        metrics, answers = self.measure(raw), self.answers(raw)
        if not self._lines:
            self._expected = answers
        agreement = float(np.mean([a == b for a, b in zip(answers, self._expected)]))
        line = Line(precision, engine, {name: metrics[name] for name in self.figures}, agreement, kernels)
        key = f"{engine}-{precision}"
        self._lines[key], self.metrics[key] = line, metrics
        return line

    def drop(self, line: Line) -> float:
        """Points that it loses to the checkpoint, of the metric that loses most."""
        reference = self.table[0].judged
        return max(POINTS[name] * (reference[name] - value) for name, value in line.judged.items())

    def refuse_loss(self, line: Line, name: str, max_drop: float, remedy: str) -> None:
        """Raises ExportError when what ``name`` holds loses more than ``max_drop`` points."""
        if (drop := self.drop(line)) > max_drop:
            raise ExportError(
                f"{name} loses {drop:.2f} points of {self.judged}, more than --max-drop {max_drop}",
                f"{remedy}, or raise --max-drop; nothing was written",
            )
