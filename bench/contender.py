"""What a suite compares: an engine and how it runs the weights."""

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
