"""Is the ONNX graph the same function as the PyTorch model? Asked on real texts, in the shapes of production."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from deploykit.data.sample import evenly
from deploykit.errors import ExportError
from deploykit.runtime.batching import batches
from deploykit.runtime.engines.protocol import Engine
from deploykit.tasks.classification.checkpoint import TorchClassifier

BATCH_SIZES = (1, 4, 32)
_ROWS = 64
_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Parity:
    """Differences of logits over ``rows`` texts, each run at every batch size; lengths in tokens."""

    rows: int
    batch_sizes: tuple[int, ...]
    shortest: int
    longest: int
    max_difference: float
    mean_difference: float
    argmax_agreement: float

    def to_json(self) -> dict[str, Any]:
        return {**self.__dict__, "batch_sizes": list(self.batch_sizes)}


def check_parity(reference: TorchClassifier, engine: Engine, texts: Sequence[str]) -> Parity:
    """Compare fp32 logits. Raises ExportError with the measured difference when they are not the same.

    The texts are spread over all lengths, and joined texts reach the model's longest input.
    """
    token_ids = _spread(reference, texts)
    task = reference.task
    differences, agreed = [], []
    for size in BATCH_SIZES:
        for batch in batches(token_ids, task.pad_token_id, max_length=task.max_length, token_budget=1 << 30):
            for start in range(0, len(batch.rows), size):
                ids, mask = batch.input_ids[start : start + size], batch.attention_mask[start : start + size]
                expected = reference.logits(ids, mask)
                actual = engine.run({"input_ids": ids, "attention_mask": mask})[0]
                difference = np.abs(expected - actual)
                differences.append(difference)
                # Two labels that PyTorch itself puts closer than the tolerance are a tie.
                answers, gap = actual.argmax(axis=1), expected.max(axis=1)
                agreed.append(gap - np.take_along_axis(expected, answers[:, None], axis=1)[:, 0] <= _TOLERANCE)
    all_differences = np.concatenate([d.ravel() for d in differences])
    lengths = [len(ids) for ids in token_ids]
    parity = Parity(
        rows=len(token_ids),
        batch_sizes=BATCH_SIZES,
        shortest=min(lengths),
        longest=max(lengths),
        max_difference=float(all_differences.max()),
        mean_difference=float(all_differences.mean()),
        argmax_agreement=float(np.concatenate(agreed).mean()),
    )
    if not parity.max_difference <= _TOLERANCE or parity.argmax_agreement < 1:  # "not <=" catches NaN too
        raise ExportError(
            f"the ONNX graph differs from the PyTorch model: logits by up to {parity.max_difference:.2g}, "
            f"answers agree on {parity.argmax_agreement:.1%} of {parity.rows} texts",
            "this architecture does not export faithfully; nothing was written",
        )
    return parity


def _spread(reference: TorchClassifier, texts: Sequence[str]) -> list[list[int]]:
    sample = sorted(reference.encode(list(texts[: 8 * _ROWS])), key=len)
    return evenly(sample, _ROWS) + reference.encode(["a", " ".join(texts[:64])])
