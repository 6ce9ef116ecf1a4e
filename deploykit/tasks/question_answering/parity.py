"""Check with real questions, from text to span, that the ONNX graph computes the same as the PyTorch model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from deploykit.data.sample import evenly
from deploykit.errors import ExportError
from deploykit.graphs.encoder_export import running
from deploykit.quantization.encoder import GRAPH
from deploykit.runtime.batching import batches
from deploykit.runtime.engines.protocol import Engine
from deploykit.tasks.question_answering.calibration import sample_windows
from deploykit.tasks.question_answering.checkpoint import TorchAnswerer
from deploykit.tasks.question_answering.predictor import Answerer, Pair, with_types

BATCH_SIZES = (1, 4, 32)
_WINDOWS = 64
_QUESTIONS = 64
_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Parity:
    """Differences of logits over ``windows``, each run at every batch size; lengths in tokens. ``same_spans`` is the
    share of ``questions`` answered with the same span."""

    windows: int
    batch_sizes: tuple[int, ...]
    shortest: int
    longest: int
    max_difference: float
    mean_difference: float
    questions: int
    same_spans: float

    def to_json(self) -> dict[str, Any]:
        return {**self.__dict__, "batch_sizes": list(self.batch_sizes)}


def check_parity(reference: TorchAnswerer, engine: Engine, exported: Answerer, pairs: Sequence[Pair]) -> Parity:
    """Compare fp32 logits and answers. Raises ExportError with the measured differences if they are not the same.

    Two spans that are equally probable for PyTorch, within the tolerance, count as the same.
    """
    task = reference.task
    asked = evenly(pairs, _QUESTIONS)
    sample = sample_windows(reference.tokenizer, asked, _WINDOWS)
    differences = []
    for size in BATCH_SIZES:
        for batch in batches(
            [w.ids for w in sample], task.pad_token_id, max_length=task.max_length, token_budget=1 << 30
        ):
            for start in range(0, len(batch.rows), size):
                part = slice(start, start + size)
                mask = batch.attention_mask[part]
                inputs = with_types(task, batch.input_ids[part], mask, sample, batch.rows[part])
                with running(GRAPH, "onnxruntime"):
                    found = engine.run(inputs)
                for expected, actual in zip(reference.run(inputs), found):
                    differences.append(np.abs(expected - actual)[mask == 1])
    all_differences = np.concatenate(differences)
    same = []
    for theirs, ours in zip(reference.try_all(asked, top_k=2), exported.try_all(asked, top_k=2)):
        if isinstance(theirs, Exception) or isinstance(ours, Exception):
            same.append(str(theirs) == str(ours))
            continue
        best, other = theirs.decide(task.no_answer_threshold), ours.decide(task.no_answer_threshold)
        tie = any(abs(best.score - span.score) <= _TOLERANCE for span in theirs.spans if span.text == other.text)
        same.append((best.start, best.end) == (other.start, other.end) or tie)
    lengths = [len(w.ids) for w in sample]
    parity = Parity(
        windows=len(sample),
        batch_sizes=BATCH_SIZES,
        shortest=min(lengths),
        longest=max(lengths),
        max_difference=float(all_differences.max()),
        mean_difference=float(all_differences.mean()),
        questions=len(asked),
        same_spans=float(np.mean(same)),
    )
    if not parity.max_difference <= _TOLERANCE or parity.same_spans < 1:  # "not <=" catches NaN too
        raise ExportError(
            f"the ONNX graph differs from the PyTorch model: logits by up to {parity.max_difference:.2g}, the same span "
            f"for {parity.same_spans:.1%} of {parity.questions} questions",
            "this architecture does not export faithfully; nothing was written",
        )
    return parity
