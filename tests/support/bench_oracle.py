"""A predictor that bench can measure without a model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from deploykit.tasks.classification.facts import Classification

TEXTS = ["yes", "no", "yes yes", "no no"]
LABELS = ["yes", "no", "yes", "no"]


class Oracle:
    """A predictor that answers yes or no; the shared list ``calls`` records calls."""

    task = Classification(("no", "yes"), max_length=8, pad_token_id=0)

    def __init__(self, name: str, calls: list[str] | None = None, *, change: bool = False) -> None:
        self._name, self._calls, self._change = name, calls if calls is not None else [], change
        self._asked = 0

    def scores(self, texts: Sequence[str]) -> NDArray[np.float32]:
        self._calls.append(self._name)
        self._asked += 1
        yes = np.array(["yes" in text for text in texts], np.float32)
        if self._change and self._asked > 1:
            yes = 1 - yes
        return np.stack([1 - yes, yes], axis=1)

    def close(self) -> None:
        pass
