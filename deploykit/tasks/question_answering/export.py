"""What the export of an answerer is made of: its graphs, their quantization, their accuracy."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray

from deploykit import artifacts
from deploykit.data.sample import evenly
from deploykit.errors import ExportError
from deploykit.graphs.export_options import CalibrationOptions, ExportOptions, Say, Written, keep_samples, pick_rows
from deploykit.graphs.onnx_export import Signature, export_encoder, export_half_encoder, save_hub_files
from deploykit.measurement_log import Trace
from deploykit.quantization.calibration import Calibration
from deploykit.quantization.encoder import (
    SCHEMES,
    Calibrated,
    GraphQuantizer,
    activations_of,
    calibrate_smoothed,
)
from deploykit.quantization.grading import Grader, Line
from deploykit.quantization.qdq import Ranges
from deploykit.quantization.search import SAMPLE, Search, hold_limit
from deploykit.quantization.smooth_quant import Scales, smooth
from deploykit.quantization.tables import render
from deploykit.runtime.engines import ENGINES, load_engine
from deploykit.runtime.engines.protocol import Engine, Precision
from deploykit.runtime.engines.tensorrt import runs_here
from deploykit.tasks.question_answering.calibration import calibrate, sample_windows, token_rows
from deploykit.tasks.question_answering.checkpoint import TorchAnswerer
from deploykit.tasks.question_answering.evaluate import found_for, labelled_questions
from deploykit.tasks.question_answering.facts import QuestionAnswering, as_text
from deploykit.tasks.question_answering.metrics import answer_metrics
from deploykit.tasks.question_answering.parity import check_parity
from deploykit.tasks.question_answering.predictor import Answerer, load_answerer
from deploykit.tasks.question_answering.rows import Example
from deploykit.tasks.question_answering.spans import Found
from deploykit.tensorrt.build import GRAPHS, EngineOptions, build_engine, plan

__all__ = ["calibrate", "calibration_texts", "write", "write_fp32"]

_GRAPH = "model.onnx"
_HALF = {"fp16": torch.float16, "bf16": torch.bfloat16}
_REMEDY = "another --method, --smooth-quant, more --calibration-rows"


def write(
    checkpoint: Path, directory: Path, options: ExportOptions, saved: Calibration | None, trace: Trace, say: Say
) -> Written:
    """Write the graphs of an answerer and what serving them needs to ``directory``; without ``saved``, calibrate."""
    reference = TorchAnswerer.load(checkpoint)
    task = reference.task
    if options.trt is not None:
        plan(options.trt, task.shape_limits)
    rows = _rows(checkpoint, options.data, "test", options)
    rows = evenly(rows, options.measure_rows or len(rows))
    say(f"measuring on {len(rows):,} questions")
    say("exporting to ONNX")
    _write_fp32(reference, directory)
    keep_samples(directory, rows)
    engine = load_engine("onnxruntime", directory / _GRAPH)
    pairs = [(row.question, row.context) for row in rows]
    parity = check_parity(reference, engine, load_answerer(directory, task, engine), pairs)
    say(
        f"parity with PyTorch: logits differ by at most {parity.max_difference:.1e} (mean {parity.mean_difference:.1e}) "
        f"over {parity.windows} windows of {parity.shortest} to {parity.longest} tokens, batches of "
        f"{', '.join(map(str, parity.batch_sizes))}; {parity.same_spans:.0%} equal spans over {parity.questions} questions"
    )
    metrics: dict[str, Any] = {"parity": parity.to_json(), "rows": len(rows)}
    grader = _Grader(directory, task, rows)
    grader.grade_answerer("fp32", "pytorch", reference)
    for name in _engines("fp32"):
        grader.grade("fp32", name)
    ranges: Ranges = {}
    smoothing: Scales = {}
    if options.int8:
        calibrated = _calibrate(checkpoint, directory, task, saved, options, say)
        smoothing = calibrated.smoothing
        metrics["quantization"], ranges = _quantize(calibrated, directory, options, grader, trace, say)
    if options.trt is not None:
        metrics["engines"] = _build_engines(directory, reference, options, options.trt, ranges, smoothing, grader, say)
    metrics["test"] = grader.metrics
    metrics["accuracy_table"] = [line.to_json() for line in grader.table]
    for line in render(metrics["accuracy_table"]):
        say(line)
    return Written(task, metrics)


def write_fp32(checkpoint: Path, directory: Path, options: CalibrationOptions) -> QuestionAnswering:
    """Write what ``calibrate`` reads of a checkpoint."""
    reference = TorchAnswerer.load(checkpoint)
    _write_fp32(reference, directory)
    return reference.task


def calibration_texts(source: Path, task: QuestionAnswering, options: CalibrationOptions) -> list[str]:
    """Return rows of a file, or of the splits of the checkpoint ``source``, as texts."""
    rows = _rows(source, options.calibration, options.calibration, options)
    return [as_text(row.question, row.context) for row in evenly(rows, options.calibration_rows)]


def signature_of(task: QuestionAnswering) -> Signature:
    """Return the inputs and outputs of the graph, with the names that optimum gives them."""
    return Signature(task.inputs, dict.fromkeys(("start_logits", "end_logits"), ("batch", "tokens")))


def _write_fp32(reference: TorchAnswerer, directory: Path) -> None:
    export_encoder(reference.model, directory / _GRAPH, signature_of(reference.task))
    save_hub_files(reference.model, reference.hub_tokenizer, directory)


class _Grader(Grader[list[Found]]):
    """Spans of every question."""

    figures = ("exact_match", "f1")
    limited = ("f1",)

    def __init__(self, directory: Path, task: QuestionAnswering, rows: Sequence[Example]) -> None:
        super().__init__()
        self._directory, self._task, self._rows = directory, task, rows
        self._pairs = [(row.question, row.context) for row in rows]

    def measure(self, raw: list[Found]) -> dict[str, Any]:
        return answer_metrics(self._task, raw, self._rows)

    def answers(self, raw: list[Found]) -> list[str]:
        return [found.decide(self._task.no_answer_threshold).text for found in raw]

    def grade_answerer(self, precision: str, name: str, answerer: Answerer, kernels: int = 0) -> Line:
        found = found_for(answerer, self._pairs, lambda done, of: None)
        return self.enter(precision, name, found, kernels)

    def grade(self, precision: Precision, name: str) -> Line:
        """Raises ExportError when the engine runs none of an INT8 graph's layers in INT8."""
        graph = self._directory / ENGINES[name].graphs[precision]
        engine = load_engine(name, graph)
        kernels = engine.int8_kernels() if precision == "int8" else 0
        if precision == "int8" and kernels == 0:
            raise ExportError(
                f"{graph.name}: {name} runs none of its layers in INT8", "this engine version ignores Q/DQ: upgrade it"
            )
        return self._grade_engine(precision, name, engine, kernels)

    def grade_graph(self, precision: str, name: str, file: str, kernels: int = 0) -> Line:
        """Grade what the engine ``name`` computes of ``file``."""
        return self._grade_engine(precision, name, load_engine(name, self._directory / file), kernels)

    def _grade_engine(self, precision: str, name: str, engine: Engine, kernels: int) -> Line:
        return self.grade_answerer(precision, name, load_answerer(self._directory, self._task, engine), kernels)

    def sample(self, precision: Precision, name: str) -> NDArray[np.float32]:
        """Return the logits of some windows, padding included, float32 [values]."""
        engine = load_engine(name, self._directory / ENGINES[name].graphs[precision])
        answerer = load_answerer(self._directory, self._task, engine)
        windows = sample_windows(answerer.tokenizer, evenly(self._pairs, SAMPLE), SAMPLE)
        return np.concatenate([part.ravel() for _, *logits in answerer.logits(windows) for part in logits])


def _calibrate(
    checkpoint: Path,
    directory: Path,
    task: QuestionAnswering,
    saved: Calibration | None,
    options: ExportOptions,
    say: Say,
) -> Calibrated:
    """Collect what was not ``saved``. Raises ExportError where SmoothQuant finds nothing to smooth."""
    graph = directory / _GRAPH
    if saved is not None:
        saved.check(activations_of(graph))
        return Calibrated(onnx.load(graph), saved)
    texts = calibration_texts(checkpoint, task, options)
    say(f"calibrating on {options.calibration}")
    return calibrate_smoothed(graph, token_rows(directory, task, texts), options.smooth_quant, say)


def _quantize(
    calibrated: Calibrated, directory: Path, options: ExportOptions, grader: _Grader, trace: Trace, say: Say
) -> tuple[dict[str, Any], Ranges]:
    """Write a Q/DQ graph for each engine; where one loses too much, with its most sensitive layers left in fp32.

    Returns what the manifest says of it, and the ranges of the activations that are S8 (in OpenVINO's graph).
    """
    calibration, ranges = calibrated.calibration, calibrated.calibration.ranges(options.method)
    say(calibration.told(options.method))
    calibration.save(directory)
    calibration.save_ranges(directory, options.method, ranges)
    quantizers = {
        f"model.{scheme}.onnx": GraphQuantizer(calibrated.model, directory / f"model.{scheme}.onnx", scheme, ranges)
        for scheme in SCHEMES
    }
    whole, *_ = [quantizer.write(ranges) for quantizer in quantizers.values()]
    say(
        f"quantized {whole.linear_layers} linear layers ({whole.quantize_nodes} QuantizeLinear, "
        f"{whole.dequantize_nodes} DequantizeLinear nodes) and {whole.embeddings} embedding tables"
    )
    say("measuring accuracy")
    searches: dict[str, Search] = {}
    kept: dict[str, Collection[str]] = {}
    for engine in _engines("int8"):
        file = ENGINES[engine].graphs["int8"]
        if file not in quantizers:
            continue
        search = _hold_limit(engine, quantizers[file], options, grader, trace, say)
        if search is not None:
            searches[engine], kept[file] = search, search.kept
    smoothed = calibrated.smoothed
    record = {
        **dataclasses.asdict(whole),
        "method": options.method,
        "calibration": calibration.to_json(),
        "smooth_quant": {"alpha": options.smooth_quant, **dataclasses.asdict(smoothed)} if smoothed else None,
        "search": {engine: dataclasses.asdict(search) for engine, search in searches.items()},
    }
    return record, {name: limits for name, limits in ranges.items() if name not in kept.get("model.s8s8.onnx", ())}


def _hold_limit(
    engine: str, quantizer: GraphQuantizer, options: ExportOptions, grader: _Grader, trace: Trace, say: Say
) -> Search | None:
    """Of the quantizer's parts, leave as few as hold the limit in fp32."""

    def write(kept: Collection[str]) -> Line:
        quantizer.write(set(quantizer.parts) - set(kept))
        return grader.grade("int8", engine)

    def sample(part: str | None) -> NDArray[np.float32]:
        quantizer.write([] if part is None else [part])
        return grader.sample("int8", engine)

    name = f"INT8 on {engine}"
    return hold_limit(name, quantizer.parts, write, sample, grader, options.max_drop, trace, say, _REMEDY)


def _build_engines(
    directory: Path, reference: TorchAnswerer, options: ExportOptions, trt: EngineOptions, ranges: Ranges,
    smoothing: Scales, grader: _Grader, say: Say,
) -> list[dict[str, Any]]:  # fmt: skip
    """Write a graph of each precision in TensorRT's terms, grade what a CPU can compute of it, and build its engine,
    which is graded too where it runs here.

    INT8 is Q/DQ in the fp16 graph, smoothed as the ranges were calibrated, of the activations that have ``ranges``.
    """
    signature = signature_of(reference.task)
    inputs = dict.fromkeys(signature.inputs, ("batch", "tokens"))
    built = []
    for precision in trt.precisions:
        graph = directory / GRAPHS[precision]
        if precision in _HALF:
            export_half_encoder(reference.model, graph, _HALF[precision], signature)
        elif precision == "int8":
            half = directory / "half.onnx"
            export_half_encoder(reference.model, half, torch.float16, signature)
            model, _ = smooth(onnx.load(half), smoothing)
            count = GraphQuantizer(model, graph, "s8s8", ranges, embeddings=False).write(ranges)
            half.unlink()
            say(f"{graph.name}: {count.linear_layers} linear layers in INT8, the rest in fp16")
        remedy = "leave this --precision out, try another --method"
        if precision in ("fp16", "int8"):
            line = grader.grade_graph(f"trt {precision}", "onnxruntime", GRAPHS[precision])
            grader.refuse_loss(line, graph.name, options.max_drop, remedy)
        calibration = artifacts.digest_of(ranges) if precision == "int8" else None
        record = build_engine(graph, precision, trt, reference.task.shape_limits, say, calibration, inputs=inputs)
        if runs_here(directory / record.file):
            line = grader.grade_graph(record.precision, "tensorrt", record.file, record.int8_gemms)
            grader.refuse_loss(line, record.file, options.max_drop, remedy)
        built.append(record)
    return [dataclasses.asdict(record) for record in built]


def _engines(precision: Precision) -> list[str]:
    """Return the engines installed that have a graph in ``precision``."""
    return [name for name, info in ENGINES.items() if info.installed and precision in info.graphs]


def _rows(folder: Path, source: str | None, split: str, options: CalibrationOptions) -> list[Example]:
    """Return questions from a file, or from the splits of the run in ``folder``."""

    def read_file(path: str, part: str) -> list[Example]:
        return labelled_questions(path, encoding=options.encoding, split=part).examples

    return pick_rows(folder, source, split, Example, read_file)
