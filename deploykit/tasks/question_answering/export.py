"""Export an answerer: write its graphs, quantize them, and measure their accuracy."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deploykit.bootstrap import Measure
from deploykit.data.sample import evenly
from deploykit.errors import DataError
from deploykit.freed_memory import keep_memory
from deploykit.graphs.encoder_export import (
    EncoderGrader,
    build_engines,
    calibrated,
    engines_for,
    quantize_graphs,
)
from deploykit.graphs.export_options import (
    CalibrationOptions,
    ExportOptions,
    Say,
    Written,
    graded,
    keep_samples,
    pick_rows,
    rows_at_hand,
)
from deploykit.graphs.native_encoder import write_native
from deploykit.graphs.onnx_export import Signature, export_encoder, export_half_encoder, save_hub_files
from deploykit.measurement_log import MeasurementLog
from deploykit.quantization.calibration import Calibration
from deploykit.quantization.encoder import GRAPH
from deploykit.quantization.qdq import Ranges
from deploykit.quantization.search import SAMPLE
from deploykit.quantization.smooth_quant import Scales
from deploykit.runtime.engines import load_engine
from deploykit.runtime.engines.protocol import Engine
from deploykit.tasks.answer_each import stop_at_no_number
from deploykit.tasks.question_answering.calibration import calibrate, sample_windows, token_rows
from deploykit.tasks.question_answering.checkpoint import TorchAnswerer
from deploykit.tasks.question_answering.evaluate import as_found, found_for, labelled_questions
from deploykit.tasks.question_answering.facts import QuestionAnswering, as_text
from deploykit.tasks.question_answering.label_free import COMPARED, lost_points
from deploykit.tasks.question_answering.metrics import answer_metrics, measure_of
from deploykit.tasks.question_answering.parity import check_parity
from deploykit.tasks.question_answering.predictor import Answerer, load_answerer
from deploykit.tasks.question_answering.rows import Example
from deploykit.tasks.question_answering.spans import Found
from deploykit.tensorrt.build import plan

__all__ = ["calibrate", "calibration_texts", "write", "write_fp32"]

_TOKEN_HEAD = "qa_outputs"
"""The linear layer of start and end logits, in every encoder of transformers."""
_REMEDY = "another --method, --smooth-quant, more --calibration-rows"


def write(
    checkpoint: Path,
    directory: Path,
    options: ExportOptions,
    saved: Calibration | None,
    trace: MeasurementLog,
    say: Say,
) -> Written:
    """Write the graphs of an answerer and the files for serving to ``directory``; calibrate if ``saved`` is None."""
    keep_memory()
    reference = TorchAnswerer.load(checkpoint)
    task = reference.task
    if options.trt is not None:
        plan(options.trt, task.shape_limits)
    rows = _rows(checkpoint, options.data, "test", options)
    rows = evenly(rows, options.measure_rows or len(rows))
    say(f"measuring on {len(rows):,} questions")
    grader = _Grader(directory, task, rows, lambda: rows_at_hand(checkpoint, rows, Example))
    grader.grade_checkpoint(reference)
    say("exporting to ONNX")
    _write_fp32(reference, directory)
    keep_samples(directory, rows)
    engine = load_engine("onnxruntime", directory / GRAPH)
    pairs = _pairs(rows)
    parity = check_parity(reference, engine, load_answerer(directory, task, engine), pairs)
    say(
        f"parity with PyTorch: logits differ by at most {parity.max_difference:.1e} (mean {parity.mean_difference:.1e}) "
        f"over {parity.windows} windows of {parity.shortest} to {parity.longest} tokens, batches of "
        f"{', '.join(map(str, parity.batch_sizes))}; {parity.same_spans:.0%} equal spans over {parity.questions} questions"
    )
    metrics: dict[str, Any] = {"parity": parity.to_json(), "rows": len(rows)}
    for name in engines_for("fp32"):
        grader.grade("fp32", name)
    ranges: Ranges = {}
    smoothing: Scales = {}
    if options.int8:
        found = calibrated(
            directory,
            saved,
            lambda: token_rows(directory, task, calibration_texts(checkpoint, task, options)),
            options,
            say,
        )
        smoothing = found.smoothing
        say(found.calibration.told(options.range_method))
        ranges = found.calibration.ranges(options.range_method)
        metrics["quantization"], ranges = quantize_graphs(
            found, options.range_method, ranges, directory, options, grader, _REMEDY, trace, say,
            others=lambda: write_native(
                reference.model, directory, say, typed=task.token_types, token_head=_TOKEN_HEAD
            ),
        )  # fmt: skip
    if options.trt is not None:
        signature = signature_of(task)
        metrics["engines"] = build_engines(
            directory, functools.partial(export_half_encoder, reference.model, signature=signature), task.shape_limits,
            options, options.trt, ranges, smoothing, grader, say, dict.fromkeys(signature.inputs, ("batch", "tokens")),
        )  # fmt: skip
    return graded(task, metrics, grader)


def write_fp32(checkpoint: Path, directory: Path, options: CalibrationOptions) -> QuestionAnswering:
    """Write the fp32 graph that ``calibrate`` runs."""
    reference = TorchAnswerer.load(checkpoint)
    _write_fp32(reference, directory)
    return reference.task


def calibration_texts(source: Path, task: QuestionAnswering, options: CalibrationOptions) -> list[str]:
    """Return rows of a file, or of the splits of the checkpoint ``source``, as texts."""
    rows = _rows(source, options.calibration, options.calibration, options)
    return [as_text(row.question, row.context) for row in evenly(rows, options.rows_to_calibrate)]


def signature_of(task: QuestionAnswering) -> Signature:
    """Return the graph's inputs and outputs, named as by optimum."""
    return Signature(task.inputs, dict.fromkeys(("start_logits", "end_logits"), ("batch", "tokens")))


def _write_fp32(reference: TorchAnswerer, directory: Path) -> None:
    export_encoder(reference.model, directory / GRAPH, signature_of(reference.task))
    save_hub_files(reference.model, reference.hub_tokenizer, directory)


class _Grader(EncoderGrader[list[Found]]):
    """Measures the spans of every question."""

    figures = ("exact_match", "f1")
    limited = ("f1",)
    label_free = "answers that differ from fp32's, weighed by fp32's margin"

    def __init__(
        self,
        directory: Path,
        task: QuestionAnswering,
        rows: Sequence[Example],
        at_hand: Callable[[], Sequence[Example]],
    ) -> None:
        """``at_hand`` returns the questions to compare answers on where ``rows`` are too few."""
        super().__init__(directory)
        self._task, self._rows = task, rows
        self._pairs = _pairs(rows)
        self._at_hand = functools.cache(lambda: list(dict.fromkeys(_pairs(at_hand()))))
        self._expected_at_hand: Callable[[], list[Found | DataError]] | None = None

    def measure(self, raw: list[Found]) -> dict[str, Any]:
        return answer_metrics(self._task, raw, self._rows)

    def measure_of(self, raw: list[Found]) -> Measure:
        return measure_of(self._task, raw, self._rows)

    def answers(self, raw: list[Found]) -> list[str]:
        return [found.decide(self._task.no_answer_threshold).text for found in raw]

    def grade_checkpoint(self, reference: Answerer) -> None:
        results = reference.try_all(self._pairs)
        stop_at_no_number([row.origin for row in self._rows], results)
        self._expected_at_hand = functools.cache(lambda: reference.try_all(self._at_hand(), top_k=COMPARED))
        self.enter("fp32", "pytorch", as_found(results))

    def lost_without_labels(self, engine: Engine) -> float:
        assert self._expected_at_hand is not None, "the checkpoint is graded first"
        answerer = load_answerer(self._directory, self._task, engine)
        return lost_points(self._task, self._expected_at_hand(), answerer.try_all(self._at_hand(), top_k=COMPARED))

    def outputs(self, engine: Engine) -> list[Found]:
        return self._found(load_answerer(self._directory, self._task, engine))

    def sample_outputs(self, engine: Engine) -> NDArray[np.float32]:
        """Return the logits of some windows, padding included, float32 [values]."""
        answerer = load_answerer(self._directory, self._task, engine)
        windows = sample_windows(answerer.tokenizer, evenly(self._pairs, SAMPLE), SAMPLE)
        return np.concatenate([part.ravel() for _, *logits in answerer.logits(windows) for part in logits])

    def _found(self, answerer: Answerer) -> list[Found]:
        return found_for(answerer, self._pairs, lambda done, of: None)


def _pairs(rows: Sequence[Example]) -> list[tuple[str, str]]:
    return [(row.question, row.context) for row in rows]


def _rows(folder: Path, source: str | None, split: str, options: CalibrationOptions) -> list[Example]:
    """Return questions from a file, or from the splits of the run in ``folder``."""

    def read_file(path: str, part: str) -> list[Example]:
        return labelled_questions(path, reading=options, split=part).examples

    return pick_rows(folder, source, split, Example, read_file)
