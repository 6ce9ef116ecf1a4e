"""Bundle a classifier for a Jetson, and judge the answers of the engine that the device builds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from deploykit.runtime.engines import load_engine
from deploykit.tasks.bundle import BundledEncoder, Verdict, share
from deploykit.tasks.classification.facts import Classification
from deploykit.tasks.classification.predictor import Classifier, load_classifier
from deploykit.tasks.protocol import Predictor

# Largest distance of an engine's answers from ONNX Runtime's with the same graph, by precision: fused and reordered sums
# round differently, and INT8 values near a boundary move to the next step. The limits are well above such rounding and well
# below the effect of a wrong engine.
MEAN_DIFFERENCE: Mapping[str, float] = {"fp32": 0.005, "fp16": 0.01, "int8": 0.03}
"""The largest difference of a row's probabilities, in the mean of the rows."""
SAME_ANSWERS = 0.95


class BundledClassifier(BundledEncoder[Classification]):
    """An answer is a row of probabilities."""

    def read(self, source: str, *, kept: bool) -> Iterable[str | None]:
        from deploykit.data.texts import read_texts
        from deploykit.tasks.classification.pairs import read_pairs

        if self._task.pair:
            return (row.text for row in read_pairs(source, () if kept else self._task.text_columns))
        columns: Sequence[str] | None = ("text",) if kept else self._task.text_columns
        return (row.text for row in read_texts(source, columns, self._task.text_separator))

    def load(self, folder: Path, files: Sequence[str], engine: str, parameters: Mapping[str, str]) -> Predictor:
        loaded = load_engine(engine, folder / files[0])
        return load_classifier(folder, self._task, loaded, token_budget=int(parameters.get("token_budget", 0)))

    def answers(self, model: Predictor, texts: Sequence[str]) -> list[Any]:
        assert isinstance(model, Classifier)
        rows: list[Any] = model.scores(texts).tolist()
        return rows

    def compare(self, answers: Sequence[Any], recorded: Sequence[Any], precision: str) -> Verdict:
        scores, expected = np.asarray(answers, np.float32), np.asarray(recorded, np.float32)
        difference = float(np.abs(scores - expected).max(axis=1).mean())
        same = share(zip(self._task.decide(scores), self._task.decide(expected)))
        most = MEAN_DIFFERENCE[precision]
        return Verdict(
            difference <= most and same >= SAME_ANSWERS,  # NaN is no small difference
            f"scores differ from those recorded by {difference:.2e} in the mean, {same:.0%} equal answers",
            f"at most {most:g} and at least {SAME_ANSWERS:.0%} will do",
        )
