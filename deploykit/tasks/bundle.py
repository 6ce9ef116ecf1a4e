"""Define what a bundle for a Jetson needs of a task."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from deploykit.runtime.serving_settings import ServingSettings
from deploykit.tasks.protocol import Predictor
from deploykit.tensorrt.build import Inputs


@dataclass(frozen=True)
class Verdict:
    """What comparing answers with those recorded found; ``limits`` say what will do."""

    right: bool
    told: str
    limits: str


class BundledTask(Protocol):
    """``modules`` are what answering imports beside numpy and an engine. ``shortest`` is the least length that an engine
    is built for, unless all texts are shorter. ``streams``: whether NAME_stream goes with the model."""

    modules: tuple[str, ...]
    shortest: int
    streams: bool

    def files(self, precision: str) -> tuple[str, ...]:
        """Of an export: the graphs that engines of ``precision`` are built from, then the weights of several of them."""

    def inputs(self, graph: Path) -> Inputs:
        """Of such a graph."""

    def settings(self, most: int) -> ServingSettings:
        """Those that keep every run of an engine within ``most`` rows."""

    def read(self, source: str, *, kept: bool) -> Iterable[str | None]:
        """Texts of a file of the user's, or of the rows that an export has ``kept``."""

    def load(self, folder: Path, files: Sequence[str], engine: str, parameters: Mapping[str, str]) -> Predictor:
        """The model whose ``files`` the engine runs; ``parameters`` as config.pbtxt has them. Raises EngineError."""

    def answers(self, model: Predictor, texts: Sequence[str]) -> list[Any]:
        """What it makes of each text, as JSON has it."""

    def compare(self, answers: Sequence[Any], recorded: Sequence[Any], precision: str) -> Verdict:
        """Judge the answers of an engine of ``precision``, row by row."""


def share(pairs: Iterable[tuple[str, str]]) -> float:
    """Return the share of pairs whose parts are equal."""
    return float(np.mean([a == b for a, b in pairs]))
