"""Export a text classifier: its graphs, their quantization, their accuracy."""

from __future__ import annotations

import functools
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deploykit.bootstrap import Measure
from deploykit.data.sample import evenly
from deploykit.errors import UsageError
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
from deploykit.graphs.onnx_export import export_classifier, export_half_classifier, save_hub_files
from deploykit.measurement_log import MeasurementLog
from deploykit.quantization.calibration import Calibration
from deploykit.quantization.encoder import GRAPH, Calibrated
from deploykit.quantization.qdq import Ranges
from deploykit.quantization.search import SAMPLE
from deploykit.quantization.smooth_quant import Scales
from deploykit.runtime.engines import load_engine
from deploykit.runtime.engines.protocol import Engine
from deploykit.runtime.finite import NoNumberError
from deploykit.tasks.answer_each import answer_each, stop_at_no_number
from deploykit.tasks.classification.calibration import calibrate, token_rows
from deploykit.tasks.classification.checkpoint import TorchClassifier
from deploykit.tasks.classification.evaluate import labelled_rows
from deploykit.tasks.classification.facts import Classification
from deploykit.tasks.classification.label_free import lost_points, measure_name
from deploykit.tasks.classification.metrics import classification_metrics
from deploykit.tasks.classification.parity import check_answers, check_parity, probes, require_equal
from deploykit.tasks.classification.predictor import TextClassifier, load_classifier
from deploykit.tasks.classification.resampling import measure_of
from deploykit.tasks.classification.rows import Example
from deploykit.tensorrt.build import plan
from deploykit.training.qat import TrainedScales
from deploykit.training.trained_ranges import trained_ranges

__all__ = ["calibrate", "calibration_texts", "write", "write_fp32"]


def write(
    checkpoint: Path,
    directory: Path,
    options: ExportOptions,
    saved: Calibration | None,
    trace: MeasurementLog,
    say: Say,
) -> Written:
    """Write the graphs of a classifier and the files for serving to ``directory``; without ``saved``, calibrate."""
    reference = TorchClassifier.load(checkpoint, options.text_column)
    task = reference.task
    trained = TrainedScales.load(checkpoint)
    if trained is not None and (saved is not None or options.smooth_quant is not None or options.method is not None):
        raise UsageError(
            f"{checkpoint}: was trained for INT8 with its own ranges, so --method, --smooth-quant and --calib "
            "have no effect",
            "leave them out",
        )
    if options.trt is not None:
        plan(options.trt, task.shape_limits)
    rows = _rows(checkpoint, task, options.data, "test", options)
    rows = evenly(rows, options.measure_rows or len(rows))
    say(f"measuring on {len(rows):,} rows")
    grader = _Grader(directory, task, rows, lambda: [row.asked for row in rows_at_hand(checkpoint, rows, Example)])
    grader.grade_checkpoint(reference)
    say("exporting to ONNX")
    _write_fp32(reference, directory)
    keep_samples(directory, rows)
    engine = load_engine("onnxruntime", directory / GRAPH)
    texts = [row.asked for row in rows]
    parity = check_parity(reference, engine, texts)
    say(
        f"parity with PyTorch: logits differ by at most {parity.max_difference:.1e} (mean {parity.mean_difference:.1e}), "
        f"{parity.argmax_agreement:.0%} equal answers over {parity.rows} texts of {parity.shortest} to {parity.longest} "
        f"tokens, batches of {', '.join(map(str, parity.batch_sizes))}"
    )
    metrics: dict[str, Any] = {"parity": parity.to_json(), "rows": len(rows)}
    for name in engines_for("fp32"):
        grader.grade("fp32", name)
    check_answers(reference, load_classifier(directory, task, engine), probes(task, texts))
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
        method, ranges = _ranges(found, trained, reference, options, say)
        metrics["quantization"], ranges = quantize_graphs(
            found, method, ranges, directory, options, grader, _remedy(checkpoint, trained), trace, say,
            others=lambda: write_native(reference.model, directory, say, typed=task.token_types),
        )  # fmt: skip
    if options.trt is not None:
        metrics["engines"] = build_engines(
            directory, functools.partial(export_half_classifier, reference.model, inputs=task.inputs), task.shape_limits,
            options, options.trt, ranges, smoothing, grader, say, dict.fromkeys(task.inputs, ("batch", "tokens")),
        )  # fmt: skip
    return graded(task, metrics, grader)


def write_fp32(checkpoint: Path, directory: Path, options: CalibrationOptions) -> Classification:
    """Write what ``calibrate`` reads of a checkpoint."""
    reference = TorchClassifier.load(checkpoint, options.text_column)
    _write_fp32(reference, directory)
    return reference.task


def _write_fp32(reference: TorchClassifier, directory: Path) -> None:
    export_classifier(reference.model, directory / GRAPH, reference.task.inputs)
    # Serving machines read the truncation side from tokenizer.json.
    reference.tokenizer.backend_tokenizer.enable_truncation(
        reference.task.max_length, direction=reference.tokenizer.truncation_side
    )
    save_hub_files(reference.model, reference.tokenizer, directory)


def calibration_texts(source: Path, task: Classification, options: CalibrationOptions) -> list[str]:
    """Return rows of a file, or of the splits of the checkpoint ``source``."""
    rows = _rows(source, task, options.calibration, options.calibration, options)
    return [row.asked for row in evenly(rows, options.rows_to_calibrate)]


class _Grader(EncoderGrader[NDArray[np.float32]]):
    """Scores, float32 [rows, labels]."""

    figures = ("accuracy", "macro_f1")

    def __init__(
        self,
        directory: Path,
        task: Classification,
        rows: Sequence[Example],
        at_hand: Callable[[], Sequence[str]],
    ) -> None:
        """``at_hand`` returns the texts to compare answers on where ``rows`` are too few."""
        super().__init__(directory)
        self._task = task
        self._texts, self._origins = [row.asked for row in rows], [row.origin for row in rows]
        self._truth = task.targets([row.label for row in rows])
        if task.regression:
            self.figures, self.limited = ("pearson", "rmse"), ("pearson",)
            self._step = float(self._truth.std()) / 20 or 1.0
        self._reference: NDArray[np.float32] = np.empty(0, np.float32)
        self.label_free = measure_name(task)
        self._at_hand = functools.cache(lambda: list(dict.fromkeys(at_hand())))
        self._expected_at_hand: Callable[[], NDArray[np.float32]] | None = None

    def measure(self, raw: NDArray[np.float32]) -> dict[str, Any]:
        return classification_metrics(self._task, self._truth, raw)

    def measure_of(self, raw: NDArray[np.float32]) -> Measure:
        return measure_of(self._task, self._truth, raw)

    def answers(self, raw: NDArray[np.float32]) -> list[str]:
        if self._task.regression:  # two numbers agree when they fall in the same twentieth of the labels' deviation
            return [str(round(float(row[0]) / self._step)) for row in raw]
        return self._task.decide(raw)

    def grade_checkpoint(self, reference: TextClassifier) -> None:
        try:
            self._reference = reference.scores(self._texts)
        except NoNumberError:
            stop_at_no_number(self._origins, answer_each(reference.scores, self._texts))
            raise
        self._expected_at_hand = functools.cache(lambda: reference.scores(self._at_hand()))
        self.enter("fp32", "pytorch", self._reference)

    def lost_without_labels(self, engine: Engine) -> float:
        assert self._expected_at_hand is not None, "the checkpoint is graded first"
        return lost_points(self._task, self._expected_at_hand(), self._scores(engine, self._at_hand()))

    def check_fp32(self, outputs: NDArray[np.float32], name: str) -> None:
        require_equal(self._task, self._texts, self._reference, outputs, name)

    def outputs(self, engine: Engine) -> NDArray[np.float32]:
        scores = self._scores(engine, self._texts)
        if not self._task.regression:  # a row without numbers has a wrong answer, and not the first label
            broken = np.isnan(scores).any(axis=1)
            scores[broken] = ~self._truth[broken]
        return scores

    def sample_outputs(self, engine: Engine) -> NDArray[np.float32]:
        return self._scores(engine, evenly(self._texts, SAMPLE))

    def _scores(self, engine: Engine, texts: Sequence[str]) -> NDArray[np.float32]:
        # Of a form that computes NaN, the search for INT8 layers needs to know how much it loses.
        return self._task.scores(load_classifier(self._directory, self._task, engine).logits(texts))


def _remedy(checkpoint: Path, trained: TrainedScales | None) -> str:
    """Return a remedy for INT8 that loses too much."""
    train = f"deploykit finetune {shlex.quote(str(checkpoint))} --qat --output-dir RUN"
    if trained is not None:
        return f"training it for INT8 longer ({train})"
    return f"another --method, --smooth-quant, more --calibration-rows, training it for INT8 ({train})"


def _ranges(
    found: Calibrated, trained: TrainedScales | None, reference: TorchClassifier, options: ExportOptions, say: Say
) -> tuple[str, Ranges]:
    """Return the INT8 ranges, and the method that found them."""
    ranges = found.calibration.ranges(options.range_method)
    if trained is None:
        say(found.calibration.told(options.range_method))
        return options.range_method, ranges
    ranges = trained_ranges(trained, reference.model, found.model, ranges)
    say(f"{len(ranges)} activations have the ranges that the checkpoint was trained with")
    return "trained", ranges


def _rows(
    folder: Path, task: Classification, source: str | None, split: str, options: CalibrationOptions
) -> list[Example]:
    """Return labelled rows from a file, or from the splits of the run in ``folder``."""

    def read_file(path: str, part: str) -> list[Example]:
        rows = labelled_rows(
            path,
            task,
            text_columns=options.text_column,
            label_columns=options.label_column,
            reading=options,
            split=part,
        ).examples
        return [row for row in rows if row.text]

    return pick_rows(folder, source, split, Example, read_file)
