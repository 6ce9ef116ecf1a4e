"""Compare how a form of a language model and the checkpoint score right answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from deploykit.bootstrap import Measure
from deploykit.data.sample import evenly
from deploykit.hardware import available_cpus
from deploykit.quantization.grading import Grader, Line
from deploykit.quantization.next_token import MEASURE, log_softmax
from deploykit.runtime.engines import ENGINES
from deploykit.runtime.engines.native.causal_weights import CausalWeights
from deploykit.runtime.engines.protocol import Precision
from deploykit.runtime.finite import NoNumberError
from deploykit.tasks.answer_each import stop_at_no_number
from deploykit.tasks.text_generation.encode import ChatTokenizer, EncodedRow
from deploykit.tasks.text_generation.facts import TextGeneration
from deploykit.tasks.text_generation.generator import LocalGenerator, RowScore
from deploykit.tasks.text_generation.metrics import scored_measure, scored_metrics
from deploykit.tasks.text_generation.predictor import load_generator

ENGINE = "onnxruntime"
"""The engine that runs language models on every machine. Parity is checked with it."""
_SEARCH_ROWS = 16
_KEPT_LOGITS = 250_000_000
_KERNELS = ("MatMulNBits", "MatMulIntegerToFloat")
"""ONNX Runtime's operators of quantized matrices."""


@dataclass(frozen=True)
class Scored(RowScore):
    """``tokens`` int64 [supervised]: the likeliest token at each place; ``divergence`` float64 [supervised]: the
    Kullback-Leibler divergence of the next token's distribution from that of fp32, in nats."""

    tokens: NDArray[np.int64] = dataclasses.field(default_factory=lambda: np.empty(0, np.int64))
    divergence: NDArray[np.float64] = dataclasses.field(default_factory=lambda: np.empty(0))


def scored(
    generator: LocalGenerator, rows: Sequence[EncodedRow], reference: Iterable[NDArray[np.float32]] | None = None
) -> Iterator[Scored]:
    """Score ``rows``, also against the logits of ``reference``."""
    expected = iter(() if reference is None else reference)
    for row, logits in zip(rows, generator.supervised_logits(rows)):
        targets = row.ids[1:][row.supervised[1:]]
        log = log_softmax(logits)
        best = logits.argmax(1)
        divergence = np.zeros(0)
        if reference is not None:
            right = log_softmax(next(expected))
            divergence = (np.exp(right) * (right - log)).sum(1)
        yield Scored(log[np.arange(len(targets)), targets].astype(np.float32), best == targets, best, divergence)


def lost_by_divergence(rows: Sequence[Scored]) -> float:
    """Return the points of loss that a form is expected to lose on text that fp32 itself writes: its mean divergence."""
    return 100 * float(np.concatenate([row.divergence for row in rows]).mean())


class LanguageModelGrader(Grader[list[Scored]]):
    """Scores of right answers, token by token; ``agreement`` is of the likeliest tokens."""

    figures = ("loss", "perplexity", "token_accuracy")
    limited = ("loss",)
    label_free = MEASURE

    def __init__(
        self, directory: Path, task: TextGeneration, tokenizer: ChatTokenizer, rows: Sequence[EncodedRow]
    ) -> None:
        super().__init__()
        self._directory, self._task, self.rows = directory, task, rows
        self._kept: list[NDArray[np.float32]] | None = None
        self._texts = [tokenizer.decode(row.ids[row.supervised].tolist()) for row in rows]

    def measure(self, raw: list[Scored]) -> dict[str, Any]:
        metrics = scored_metrics(raw, self._texts)
        divergence = np.concatenate([row.divergence for row in raw])
        if len(divergence):
            metrics["kl_mean"], metrics["kl_p99"] = float(divergence.mean()), float(np.percentile(divergence, 99))
        return metrics

    def measure_of(self, raw: list[Scored]) -> Measure:
        return scored_measure(raw, self._texts)

    def answers(self, raw: list[Scored]) -> list[str]:
        return [str(token) for row in raw for token in row.tokens]

    def grade_checkpoint(self, reference: LocalGenerator, origins: Sequence[str]) -> None:
        """Grade PyTorch. Raises DataError for a row, of ``origins``, for which it computes NaN or infinity."""
        raw = list(scored(reference, self.rows))
        broken = (None if np.isfinite(row.logprobs).all() else NoNumberError() for row in raw)
        stop_at_no_number(origins, broken)
        self.enter("fp32", "pytorch", raw)

    def grade(self, precision: Precision, engine: str) -> Line:
        reference = None if precision == "fp32" else self._reference_logits()
        raw = list(scored(self._load(precision, engine), self.rows, reference))
        matrices = quantized_matrices(self._directory / _file(precision, engine))
        without_labels = None if reference is None else partial(lost_by_divergence, raw)
        return self.enter(precision, engine, raw, matrices, without_labels)

    def sample(self, precision: Precision, engine: str) -> NDArray[np.float32]:
        """Return log-probabilities of the right tokens of some rows, float32 [tokens]."""
        rows = evenly(self.rows, _SEARCH_ROWS)
        return np.concatenate([score.logprobs for score in self._load(precision, engine).score(rows)])

    def _reference_logits(self) -> Iterable[NDArray[np.float32]]:
        """Return logits of the fp32 graph, kept where they fit into memory: a search compares many forms with them."""
        if self._kept is not None:
            return self._kept
        logits = self._load("fp32", ENGINE).supervised_logits(self.rows)
        if self._task.vocabulary * sum(int(row.supervised.sum()) for row in self.rows) > _KEPT_LOGITS:
            return logits
        self._kept = list(logits)
        return self._kept

    def _load(self, precision: Precision, engine: str) -> LocalGenerator:
        return load_generator(self._directory, self._task, engine, _file(precision, engine), available_cpus())


def _file(precision: Precision, engine: str) -> str:
    return ENGINES[engine].language_models[precision][0]


def quantized_matrices(file: Path) -> int:
    """Return the number of quantized matrices of a graph, or of a weights file of ``native``."""
    if file.suffix != ".onnx":
        return CausalWeights(file).quantized_matrices
    return sum(node.op_type in _KERNELS for node in onnx.load(file, load_external_data=False).graph.node)
