"""Bundle a translator for a Jetson, and judge the answers of the engine that the device builds."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from deploykit.hardware import available_cpus
from deploykit.runtime.generation import MAX_ROWS
from deploykit.runtime.serving_settings import ServingSettings
from deploykit.tasks.bundle import Verdict, share
from deploykit.tasks.protocol import Predictor
from deploykit.tasks.translation.facts import Translation
from deploykit.tasks.translation.predictor import Translator, load_translator
from deploykit.tasks.translation.translated import Translated
from deploykit.tensorrt.build import Inputs, read_inputs
from deploykit.tensorrt.options import TRANSLATOR_GRAPHS

# How much an engine's answers may differ from ONNX Runtime's with the same graph, by precision. Fused and reordered
# sums round differently, and INT8 values near a boundary move to the next step. The limits are well above the effect of
# such rounding and well below that of a wrong engine.
# Measured with the demo's translator: ONNX Runtime with all fusions off has a chrF of 98.3 and a difference of 0.0006
# in INT8, 100 and 0.00006 in fp16. With one wrong INT8 range the chrF is at most 84.8 and the difference at least
# 0.034.
LEAST_CHRF: Mapping[str, float] = {"fp32": 97.0, "fp16": 95.0, "int8": 90.0}
"""Least chrF of the texts against the recorded ones. A tie that is decided differently changes the words after it
only."""
SCORE_DIFFERENCE: Mapping[str, float] = {"fp32": 0.005, "fp16": 0.01, "int8": 0.02}
"""Largest difference of a translation's mean log-probability per token, averaged over the rows."""

_CHRF_ORDER, _CHRF_BETA = 6, 2


class BundledTranslator:
    """A translator's part of a bundle; an answer is a ``Translated``."""

    modules: tuple[str, ...] = ("tokenizers", "sentencepiece", "typing_extensions")
    shortest = 1
    streams = True

    def __init__(self, task: Translation) -> None:
        self._task = task

    def files(self, precision: str) -> tuple[str, ...]:
        return TRANSLATOR_GRAPHS[precision]

    def inputs(self, graph: Path) -> Inputs:
        return read_inputs(graph)

    def settings(self, most: int) -> ServingSettings:
        return ServingSettings(max_rows=most)

    def read(self, source: str, *, kept: bool) -> Iterable[str | None]:
        from deploykit.tasks.translation.rows import read_sources

        language, column = self._task.source, self._task.source_column
        rows = read_sources(source, source=language, column="source" if kept else None, prefer=None if kept else column)
        return (row.text for row in rows)

    def load(self, folder: Path, files: Sequence[str], engine: str, parameters: Mapping[str, str]) -> Predictor:
        max_rows = int(parameters.get("max_rows", MAX_ROWS))
        return load_translator(folder, self._task, files, available_cpus(), engine=engine, max_rows=max_rows)

    def answers(self, model: Predictor, texts: Sequence[str]) -> list[Any]:
        assert isinstance(model, Translator)
        return [asdict(translated) for translated in model.translate(texts)]

    def compare(self, answers: Sequence[Any], recorded: Sequence[Any], precision: str) -> Verdict:
        found, expected = ([Translated(**answer) for answer in part] for part in (answers, recorded))
        pairs = [(a.text, b.text) for a, b in zip(found, expected)]
        alike = chrf(*zip(*pairs))
        difference = float(np.mean([abs(self._per_token(a) - self._per_token(b)) for a, b in zip(found, expected)]))
        least, most = LEAST_CHRF[precision], SCORE_DIFFERENCE[precision]
        return Verdict(
            alike >= least and difference <= most,
            f"translations have a chrF of {alike:.1f} against the recorded ones ({share(pairs):.0%} equal), and "
            f"log-probabilities per token differ by {difference:.2e} in the mean",
            f"required: a chrF of at least {least:g} and a difference of at most {most:g}",
        )

    def _per_token(self, translated: Translated) -> float:
        """Return the mean log-probability per token, without the length penalty."""
        penalty = self._task.generation.length_penalty
        return translated.score * math.pow(max(translated.target_tokens, 1), penalty - 1)


def chrf(hypotheses: Sequence[str], references: Sequence[str]) -> float:
    """Return the chrF of all texts, 0 to 100, computed as sacrebleu does (Popović, WMT 2015); the device lacks
    sacrebleu."""
    counts = np.zeros((_CHRF_ORDER, 3))
    for texts in zip(hypotheses, references):
        for order in range(_CHRF_ORDER):
            a, b = (_grams("".join(text.split()), order + 1) for text in texts)
            counts[order] += a.total() if b else 0, b.total(), (a & b).total()
    counts = counts[(counts[:, :2] > 0).all(axis=1)]
    if not len(counts):
        return 100.0 if list(hypotheses) == list(references) else 0.0
    precision, recall = (float((counts[:, 2] / counts[:, i]).mean()) for i in range(2))
    weight = _CHRF_BETA**2
    return float(100 * (1 + weight) * precision * recall / max(weight * precision + recall, 1e-16))


def _grams(text: str, order: int) -> Counter[str]:
    return Counter(text[i : i + order] for i in range(len(text) - order + 1))
