"""Define the interface of a task for Jetson bundles."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import numpy as np

from deploykit.runtime.serving_settings import ServingSettings
from deploykit.tasks.protocol import Predictor
from deploykit.tensorrt.build import Inputs
from deploykit.tensorrt.options import GRAPHS


@dataclass(frozen=True)
class Verdict:
    """The result of comparing answers with the recorded ones; ``limits`` is the text of what is acceptable."""

    right: bool
    told: str
    limits: str


class BundledTask(Protocol):
    """A task's part of a bundle. ``modules`` are imports for answering besides numpy and the engine. ``shortest`` is
    the least length to build an engine for, unless all texts are shorter. ``streams``: the model has a NAME_stream."""

    modules: tuple[str, ...]
    shortest: int
    streams: bool

    def files(self, precision: str) -> tuple[str, ...]:
        """Return the files of an export: the graphs to build engines of ``precision`` from, then weights shared by
        graphs."""

    def inputs(self, graph: Path) -> Inputs:
        """Return a graph's inputs."""

    def settings(self, most: int) -> ServingSettings:
        """Return settings that limit every run of an engine to ``most`` rows."""

    def read(self, source: str, *, kept: bool) -> Iterable[str | None]:
        """Read texts from a user's file, or from the rows that an export has ``kept``."""

    def load(self, folder: Path, files: Sequence[str], engine: str, parameters: Mapping[str, str]) -> Predictor:
        """Load the model with the engine's ``files``; ``parameters`` are those of config.pbtxt. Raises EngineError."""

    def answers(self, model: Predictor, texts: Sequence[str]) -> list[Any]:
        """Answer each text with JSON values."""

    def compare(self, answers: Sequence[Any], recorded: Sequence[Any], precision: str) -> Verdict:
        """Compare the answers of an engine of ``precision`` with the recorded ones, row by row."""


class _EncoderFacts(Protocol):
    @property
    def inputs(self) -> tuple[str, ...]: ...

    @property
    def max_length(self) -> int: ...


Facts = TypeVar("Facts", bound=_EncoderFacts)


class BundledEncoder(Generic[Facts]):
    """The members of ``BundledTask`` that are the same for each task whose model is one encoder."""

    modules: tuple[str, ...] = ("tokenizers",)
    shortest = 16
    streams = False

    def __init__(self, task: Facts) -> None:
        self._task = task

    def files(self, precision: str) -> tuple[str, ...]:
        return (GRAPHS[precision],)

    def inputs(self, graph: Path) -> Inputs:
        return dict.fromkeys(self._task.inputs, ("batch", "tokens"))

    def settings(self, most: int) -> ServingSettings:
        # Short texts would fill the default budget with more rows.
        return ServingSettings(token_budget=most * min(self.shortest, self._task.max_length))


def share(pairs: Iterable[tuple[str, str]]) -> float:
    """Return the share of pairs whose parts are equal."""
    return float(np.mean([a == b for a, b in pairs]))
