"""What of a bundle depends on the model's task. The steps that make a bundle and run it ask here, and are alike for all.

The device lacks what bundling needs, and a classifier's what translating needs: both are imported where they are used.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from deploykit.export.tensorrt import CLASSIFIER_INPUTS, GRAPHS, TRANSLATOR_GRAPHS, Inputs, read_inputs
from deploykit.jetson.boards import Board
from deploykit.predictor import Predictor, is_translator
from deploykit.runtime.classifier import load_classifier
from deploykit.runtime.engines import DecodeLimits, available_cpus, load_engine
from deploykit.runtime.generation import MAX_ROWS
from deploykit.runtime.translated import Translated
from deploykit.tasks import Classification, Task, Translation

if TYPE_CHECKING:
    from deploykit.triton.repository import ServingSettings

# How far from ONNX Runtime's answers with the same graph an engine's may be, by precision: fused and reordered sums
# round otherwise, and near a boundary INT8 takes the next step. Chosen well above what such rounding does and well
# below what a wrong engine does.
MEAN_DIFFERENCE: Mapping[str, float] = {"fp32": 0.005, "fp16": 0.01, "int8": 0.03}
"""Of a classifier's probabilities: the largest difference of a row, in the mean of the rows."""
SAME_ANSWERS = 0.95
# Of the demo's translator, ONNX Runtime with all fusions off had a chrF of 98.3 and a difference of 0.0006 in INT8, of 100
# and 0.00006 in fp16; with one wrong range in all of INT8 at most 84.8 and at least 0.034.
LEAST_CHRF: Mapping[str, float] = {"fp32": 97.0, "fp16": 95.0, "int8": 90.0}
"""Of a translator's texts beside those recorded: a tie that tips over changes the words after it, not the rest."""
SCORE_DIFFERENCE: Mapping[str, float] = {"fp32": 0.005, "fp16": 0.01, "int8": 0.02}
"""Of a translation's mean log-probability per token, in the mean of the rows."""

_CHRF_ORDER, _CHRF_BETA = 6, 2


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


def bundled(task: Task) -> BundledTask:
    """The part of a bundle that knows ``task``."""
    return BundledTranslator(task) if isinstance(task, Translation) else BundledClassifier(task)


def fitted(task: Task, board: Board) -> Task:
    """What a model of ``task`` does on ``board``."""
    if isinstance(task, Classification):
        return task
    from deploykit.runtime.translator import within

    return within(task, DecodeLimits(board.max_batch, board.max_positions, board.max_positions))


class BundledClassifier:
    """An answer is a row of probabilities."""

    modules: tuple[str, ...] = ("tokenizers",)
    shortest = 16
    streams = False

    def __init__(self, task: Classification) -> None:
        self._task = task

    def files(self, precision: str) -> tuple[str, ...]:
        return (GRAPHS[precision],)

    def inputs(self, graph: Path) -> Inputs:
        return CLASSIFIER_INPUTS

    def settings(self, most: int) -> ServingSettings:
        from deploykit.triton.repository import ServingSettings

        # Short texts would fill the default budget with more rows.
        return ServingSettings(token_budget=most * min(self.shortest, self._task.max_length))

    def read(self, source: str, *, kept: bool) -> Iterable[str | None]:
        from deploykit.data.classification import read_texts

        columns: Sequence[str] | None = ("text",) if kept else self._task.text_columns
        return (row.text for row in read_texts(source, columns, self._task.text_separator))

    def load(self, folder: Path, files: Sequence[str], engine: str, parameters: Mapping[str, str]) -> Predictor:
        loaded = load_engine(engine, folder / files[0])
        return load_classifier(folder, self._task, loaded, token_budget=int(parameters.get("token_budget", 0)))

    def answers(self, model: Predictor, texts: Sequence[str]) -> list[Any]:
        assert not is_translator(model)
        rows: list[Any] = model.scores(texts).tolist()
        return rows

    def compare(self, answers: Sequence[Any], recorded: Sequence[Any], precision: str) -> Verdict:
        scores, expected = np.asarray(answers, np.float32), np.asarray(recorded, np.float32)
        difference = float(np.abs(scores - expected).max(axis=1).mean())
        same = _share(zip(self._task.decide(scores), self._task.decide(expected)))
        most = MEAN_DIFFERENCE[precision]
        return Verdict(
            difference <= most and same >= SAME_ANSWERS,  # NaN is no small difference
            f"scores differ from those recorded by {difference:.2e} in the mean, {same:.0%} equal answers",
            f"at most {most:g} and at least {SAME_ANSWERS:.0%} will do",
        )


class BundledTranslator:
    """An answer is a ``Translated``."""

    modules: tuple[str, ...] = ("tokenizers", "sentencepiece")
    shortest = 1
    streams = True

    def __init__(self, task: Translation) -> None:
        self._task = task

    def files(self, precision: str) -> tuple[str, ...]:
        return TRANSLATOR_GRAPHS[precision]

    def inputs(self, graph: Path) -> Inputs:
        return read_inputs(graph)

    def settings(self, most: int) -> ServingSettings:
        from deploykit.triton.repository import ServingSettings

        return ServingSettings(max_rows=most)

    def read(self, source: str, *, kept: bool) -> Iterable[str | None]:
        from deploykit.data.translation import read_sources

        language, column = self._task.source, self._task.source_column
        rows = read_sources(source, source=language, **({"column": "source"} if kept else {"prefer": column}))
        return (row.text for row in rows)

    def load(self, folder: Path, files: Sequence[str], engine: str, parameters: Mapping[str, str]) -> Predictor:
        from deploykit.runtime.translator import load_translator

        max_rows = int(parameters.get("max_rows", MAX_ROWS))
        return load_translator(folder, self._task, files, available_cpus(), engine=engine, max_rows=max_rows)

    def answers(self, model: Predictor, texts: Sequence[str]) -> list[Any]:
        assert is_translator(model)
        return [asdict(translated) for translated in model.translate(texts)]

    def compare(self, answers: Sequence[Any], recorded: Sequence[Any], precision: str) -> Verdict:
        found, expected = ([Translated(**answer) for answer in part] for part in (answers, recorded))
        pairs = [(a.text, b.text) for a, b in zip(found, expected)]
        alike = chrf(*zip(*pairs))
        difference = float(np.mean([abs(self._per_token(a) - self._per_token(b)) for a, b in zip(found, expected)]))
        least, most = LEAST_CHRF[precision], SCORE_DIFFERENCE[precision]
        return Verdict(
            alike >= least and difference <= most,
            f"translations have a chrF of {alike:.1f} beside those recorded ({_share(pairs):.0%} equal), and "
            f"log-probabilities per token differ by {difference:.2e} in the mean",
            f"at least {least:g} and at most {most:g} will do",
        )

    def _per_token(self, translated: Translated) -> float:
        """Its mean log-probability, whatever the length penalty."""
        penalty = self._task.generation.length_penalty
        return translated.score * math.pow(max(translated.target_tokens, 1), penalty - 1)


def chrf(hypotheses: Sequence[str], references: Sequence[str]) -> float:
    """chrF of all texts, from 0 to 100, as sacrebleu computes it, which the device lacks (Popović, WMT 2015)."""
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


def _share(pairs: Iterable[tuple[str, str]]) -> float:
    """Of pairs, those of equal parts."""
    return float(np.mean([a == b for a, b in pairs]))
