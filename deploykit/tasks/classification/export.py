"""What the export of a text classifier is made of: its graphs, their quantization, their accuracy."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray

from deploykit import artifacts
from deploykit.data.sample import evenly
from deploykit.errors import ExportError, UsageError
from deploykit.graphs.export_options import CalibrationOptions, ExportOptions, Say, Written, keep_samples, pick_rows
from deploykit.graphs.onnx_export import export_classifier, export_half_classifier, save_hub_files
from deploykit.measurement_log import Trace
from deploykit.quantization.calibration import Calibration
from deploykit.quantization.encoder import (
    SCHEMES,
    Calibrated,
    GraphQuantizer,
    Quantizer,
    activations_of,
    calibrate_smoothed,
)
from deploykit.quantization.grading import Grader, Line
from deploykit.quantization.qdq import Ranges
from deploykit.quantization.search import SAMPLE, Search, hold_limit
from deploykit.quantization.smooth_quant import Scales, smooth
from deploykit.quantization.tables import render
from deploykit.runtime.engines import ENGINES, NATIVE_FILE, load_engine
from deploykit.runtime.engines.protocol import Engine, Precision
from deploykit.runtime.engines.tensorrt import EngineRecord, runs_here
from deploykit.tasks.classification.calibration import calibrate, token_rows
from deploykit.tasks.classification.checkpoint import TorchClassifier
from deploykit.tasks.classification.encoders import EncoderClassifier, read_encoder
from deploykit.tasks.classification.evaluate import labelled_rows
from deploykit.tasks.classification.facts import Classification
from deploykit.tasks.classification.metrics import classification_metrics
from deploykit.tasks.classification.native_program import linear_parts, save_native_classifier
from deploykit.tasks.classification.parity import check_answers, check_parity, probes, require_equal
from deploykit.tasks.classification.predictor import TextClassifier, load_classifier
from deploykit.tasks.classification.rows import Example
from deploykit.tensorrt.build import GRAPHS, EngineOptions, build_engine, plan
from deploykit.training.qat import TrainedScales
from deploykit.training.trained_ranges import trained_ranges

__all__ = ["calibrate", "calibration_texts", "write", "write_fp32"]
_GRAPH = "model.onnx"
_HALF = {"fp16": torch.float16, "bf16": torch.bfloat16}


def write(
    checkpoint: Path, directory: Path, options: ExportOptions, saved: Calibration | None, trace: Trace, say: Say
) -> Written:
    """Write the graphs of a classifier and what serving them needs to ``directory``; without ``saved``, calibrate."""
    reference = TorchClassifier.load(checkpoint)
    task = reference.task
    trained = TrainedScales.load(checkpoint)
    if trained is not None and (
        saved is not None or options.smooth_quant is not None or options.method != ExportOptions.method
    ):
        raise UsageError(
            f"{checkpoint}: was trained for INT8 with ranges of its own, for which --method, --smooth-quant and --calib "
            "do nothing",
            "leave them out",
        )
    if options.trt is not None:
        plan(options.trt, task.shape_limits)
    rows = _rows(checkpoint, task, options.data, "test", options)
    rows = evenly(rows, options.measure_rows or len(rows))
    say(f"measuring on {len(rows):,} rows")
    say("exporting to ONNX")
    _write_fp32(reference, directory)
    keep_samples(directory, rows)
    parity = check_parity(reference, load_engine("onnxruntime", directory / _GRAPH), [row.text for row in rows])
    say(
        f"parity with PyTorch: logits differ by at most {parity.max_difference:.1e} (mean {parity.mean_difference:.1e}), "
        f"{parity.argmax_agreement:.0%} equal answers over {parity.rows} texts of {parity.shortest} to {parity.longest} "
        f"tokens, batches of {', '.join(map(str, parity.batch_sizes))}"
    )
    metrics: dict[str, Any] = {"parity": parity.to_json(), "rows": len(rows)}
    grader = _Grader(directory, task, rows)
    grader.grade_checkpoint(reference)
    for engine in _engines("fp32"):
        grader.grade("fp32", engine)
    exported = load_classifier(directory, task, load_engine("onnxruntime", directory / _GRAPH))
    check_answers(reference, exported, probes([row.text for row in rows]))
    ranges: Ranges = {}
    smoothing: Scales = {}
    if options.int8:
        calibrated = _calibrate(checkpoint, directory, task, saved, options, say)
        smoothing = calibrated.smoothing
        remedy = _remedy(checkpoint, trained)
        metrics["quantization"], ranges = _quantize(
            calibrated, trained, directory, reference, options, grader, remedy, trace, say
        )
    if options.trt is not None:
        metrics["engines"] = _build_engines(directory, reference, options, options.trt, ranges, smoothing, grader, say)
    metrics["test"] = grader.metrics
    metrics["accuracy_table"] = [line.to_json() for line in grader.table]
    for line in render(metrics["accuracy_table"]):
        say(line)
    return Written(task, metrics)


def write_fp32(checkpoint: Path, directory: Path, options: CalibrationOptions) -> Classification:
    """Write what ``calibrate`` reads of a checkpoint."""
    reference = TorchClassifier.load(checkpoint)
    _write_fp32(reference, directory)
    return reference.task


def _write_fp32(reference: TorchClassifier, directory: Path) -> None:
    export_classifier(reference.model, directory / _GRAPH)
    # Serving machines read the truncation side from tokenizer.json.
    reference.tokenizer.backend_tokenizer.enable_truncation(
        reference.task.max_length, direction=reference.tokenizer.truncation_side
    )
    save_hub_files(reference.model, reference.tokenizer, directory)


def calibration_texts(source: Path, task: Classification, options: CalibrationOptions) -> list[str]:
    """Rows of a file, or of the splits of the checkpoint ``source``."""
    rows = _rows(source, task, options.calibration, options.calibration, options)
    return [row.text for row in evenly(rows, options.calibration_rows)]


class _Grader(Grader[NDArray[np.float32]]):
    """Scores, float32 [rows, labels]."""

    figures = ("accuracy", "macro_f1")

    def __init__(self, directory: Path, task: Classification, rows: Sequence[Example]) -> None:
        super().__init__()
        self._directory, self._task = directory, task
        self._texts = [row.text for row in rows]
        self._truth = task.targets([row.label for row in rows])
        if task.regression:
            self.figures, self.limited = ("pearson", "rmse"), ("pearson",)
            self._step = float(self._truth.std()) / 20 or 1.0
        self._reference: NDArray[np.float32] = np.empty(0, np.float32)

    def measure(self, raw: NDArray[np.float32]) -> dict[str, Any]:
        return classification_metrics(self._task, self._truth, raw)

    def answers(self, raw: NDArray[np.float32]) -> list[str]:
        if self._task.regression:  # two numbers agree when they fall in the same twentieth of the labels' deviation
            return [str(round(float(row[0]) / self._step)) for row in raw]
        return self._task.decide(raw)

    def grade_checkpoint(self, reference: TextClassifier) -> None:
        self._reference = reference.scores(self._texts)
        self.enter("fp32", "pytorch", self._reference)

    def grade(self, precision: Precision, name: str) -> Line:
        """Raises ExportError when fp32 answers differ from PyTorch's, or no layer of an INT8 graph runs in INT8."""
        graph = self._directory / ENGINES[name].graphs[precision]
        engine = load_engine(name, graph)
        kernels = engine.int8_kernels() if precision == "int8" else 0
        if precision == "int8" and kernels == 0:
            raise ExportError(
                f"{graph.name}: {name} runs none of its layers in INT8", "this engine version ignores Q/DQ: upgrade it"
            )
        scores = self._scores(engine)
        if precision == "fp32":
            require_equal(self._task, self._texts, self._reference, scores, f"{graph.name} on {name}")
        return self.enter(precision, name, scores, kernels)

    def grade_for_tensorrt(self, precision: str) -> Line:
        """The graph that an engine is built from, as ONNX Runtime computes it on the CPU."""
        engine = load_engine("onnxruntime", self._directory / GRAPHS[precision])
        return self.enter(f"trt {precision}", "onnxruntime", self._scores(engine))

    def grade_engine(self, record: EngineRecord) -> Line:
        """A TensorRT engine itself, on the GPU here."""
        engine = load_engine("tensorrt", self._directory / record.file)
        return self.enter(record.precision, "tensorrt", self._scores(engine), record.int8_gemms)

    def sample(self, precision: Precision, name: str) -> NDArray[np.float32]:
        """Scores of some of the rows, float32 [rows, labels]."""
        engine = load_engine(name, self._directory / ENGINES[name].graphs[precision])
        return self._scores(engine, evenly(self._texts, SAMPLE))

    def _scores(self, engine: Engine, texts: Sequence[str] | None = None) -> NDArray[np.float32]:
        return load_classifier(self._directory, self._task, engine).scores(self._texts if texts is None else texts)


class _NativeQuantizer:
    """Writes the weights of deploykit's own engine. Its parts are layers; it needs no ranges."""

    def __init__(self, encoder: EncoderClassifier, path: Path) -> None:
        self._encoder, self._path = encoder, path
        self.parts = linear_parts(encoder)

    def write(self, parts: Collection[str]) -> None:
        save_native_classifier(self._path, self._encoder, parts)


def _calibrate(
    checkpoint: Path, directory: Path, task: Classification, saved: Calibration | None, options: ExportOptions, say: Say
) -> Calibrated:
    """Collect what was not ``saved``. Raises ExportError where SmoothQuant finds nothing to smooth."""
    graph = directory / _GRAPH
    if saved is not None:
        saved.check(activations_of(graph))
        return Calibrated(onnx.load(graph), saved)
    texts = calibration_texts(checkpoint, task, options)
    say(f"calibrating on {options.calibration}")
    return calibrate_smoothed(graph, token_rows(directory, task, texts), options.smooth_quant, say)


def _remedy(checkpoint: Path, trained: TrainedScales | None) -> str:
    """What else to try where INT8 loses too much."""
    train = f"deploykit finetune {shlex.quote(str(checkpoint))} --qat --output-dir RUN"
    if trained is not None:
        return f"training it for INT8 longer ({train})"
    return f"another --method, --smooth-quant, more --calibration-rows, training it for INT8 ({train})"


def _quantize(
    calibrated: Calibrated, trained: TrainedScales | None, directory: Path, reference: TorchClassifier,
    options: ExportOptions, grader: _Grader, remedy: str, trace: Trace, say: Say,
) -> tuple[dict[str, Any], Ranges]:  # fmt: skip
    """Write a Q/DQ graph for each engine; where one loses too much, with its most sensitive layers left in fp32.

    Returns what the manifest says of it, and the ranges of the activations that are S8 (in OpenVINO's graph).
    """
    model, calibration = calibrated.model, calibrated.calibration
    method, ranges = str(options.method), calibration.ranges(options.method)
    if trained is None:
        say(calibration.told(options.method))
    else:
        method, ranges = "trained", trained_ranges(trained, reference.model, model, ranges)
        say(f"{len(ranges)} activations have the ranges that the checkpoint was trained with")
    calibration.save(directory)
    calibration.save_ranges(directory, method, ranges)
    graphs = {scheme: GraphQuantizer(model, directory / f"model.{scheme}.onnx", scheme, ranges) for scheme in SCHEMES}
    whole, *_ = [quantizer.write(ranges) for quantizer in graphs.values()]
    say(
        f"quantized {whole.linear_layers} linear layers ({whole.quantize_nodes} QuantizeLinear, "
        f"{whole.dequantize_nodes} DequantizeLinear nodes) and {whole.embeddings} embedding tables"
    )
    quantizers: dict[str, Quantizer] = {f"model.{scheme}.onnx": quantizer for scheme, quantizer in graphs.items()}
    if (native := _native_quantizer(reference, directory, say)) is not None:
        native.write(native.parts)
        quantizers[NATIVE_FILE] = native
    say("measuring accuracy")
    searches: dict[str, Search] = {}
    kept: dict[str, Collection[str]] = {}
    for engine in _engines("int8"):
        file = ENGINES[engine].graphs["int8"]
        if file not in quantizers:
            continue
        search = _hold_limit(engine, quantizers[file], options, grader, remedy, trace, say)
        if search is not None:
            searches[engine], kept[file] = search, search.kept
    smoothed = calibrated.smoothed
    record = {
        **dataclasses.asdict(whole),
        "method": method,
        "calibration": calibration.to_json(),
        "smooth_quant": {"alpha": options.smooth_quant, **dataclasses.asdict(smoothed)} if smoothed else None,
        "search": {engine: dataclasses.asdict(search) for engine, search in searches.items()},
    }
    return record, {name: limits for name, limits in ranges.items() if name not in kept.get("model.s8s8.onnx", ())}


def _native_quantizer(reference: TorchClassifier, directory: Path, say: Say) -> _NativeQuantizer | None:
    """None, and a word of it, for a model that deploykit's own engine does not run."""
    try:
        return _NativeQuantizer(read_encoder(reference.model), directory / NATIVE_FILE)
    except ExportError as error:
        say(f"nothing for the engine native: {error.message}")
        return None


def _hold_limit(
    engine: str, quantizer: Quantizer, options: ExportOptions, grader: _Grader, remedy: str, trace: Trace, say: Say
) -> Search | None:
    """Of the quantizer's parts, leave as few as hold the limit in fp32."""

    def write(kept: Collection[str]) -> Line:
        quantizer.write(set(quantizer.parts) - set(kept))
        return grader.grade("int8", engine)

    def sample(part: str | None) -> NDArray[np.float32]:
        quantizer.write([] if part is None else [part])
        return grader.sample("int8", engine)

    return hold_limit(f"INT8 on {engine}", quantizer.parts, write, sample, grader, options.max_drop, trace, say, remedy)


def _build_engines(
    directory: Path, reference: TorchClassifier, options: ExportOptions, trt: EngineOptions, ranges: Ranges,
    smoothing: Scales, grader: _Grader, say: Say,
) -> list[dict[str, Any]]:  # fmt: skip
    """Write a graph of each precision in TensorRT's terms, grade what a CPU can compute of it, and build its engine,
    which is graded too where it runs here.

    INT8 is Q/DQ in the fp16 graph, smoothed as the ranges were calibrated, of the activations that have ``ranges``.
    """
    limits = reference.task.shape_limits
    built = []
    for precision in trt.precisions:
        graph = directory / GRAPHS[precision]
        if precision in _HALF:
            export_half_classifier(reference.model, graph, _HALF[precision])
        elif precision == "int8":
            half = directory / "half.onnx"
            export_half_classifier(reference.model, half, torch.float16)
            model, _ = smooth(onnx.load(half), smoothing)
            count = GraphQuantizer(model, graph, "s8s8", ranges, embeddings=False).write(ranges)
            half.unlink()
            say(f"{graph.name}: {count.linear_layers} linear layers in INT8, the rest in fp16")
        remedy = "leave this --precision out, try another --method"
        if precision in ("fp16", "int8"):
            grader.refuse_loss(grader.grade_for_tensorrt(precision), graph.name, options.max_drop, remedy)
        calibration = artifacts.digest_of(ranges) if precision == "int8" else None
        record = build_engine(graph, precision, trt, limits, say, calibration)
        if runs_here(directory / record.file):
            grader.refuse_loss(grader.grade_engine(record), record.file, options.max_drop, remedy)
        built.append(record)
    return [dataclasses.asdict(record) for record in built]


def _engines(precision: Precision) -> list[str]:
    """Those installed that have a graph in ``precision``."""
    return [name for name, info in ENGINES.items() if info.installed and precision in info.graphs]


def _rows(
    folder: Path, task: Classification, source: str | None, split: str, options: CalibrationOptions
) -> list[Example]:
    """Labelled rows from a file, or from the splits of the run in ``folder``."""

    def read_file(path: str, part: str) -> list[Example]:
        return labelled_rows(path, task, encoding=options.encoding, split=part).examples

    return pick_rows(folder, source, split, Example, read_file)
