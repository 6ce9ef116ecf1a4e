"""Define a contender of a suite: an engine and the precision of its weights."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Contender:
    """``engine`` running the weights in ``precision``, by the engine's own name for it."""

    engine: str
    precision: str

    @property
    def name(self) -> str:
        return f"{self.engine} {self.precision}"
