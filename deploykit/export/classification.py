"""What the export of a text classifier is made of: its graphs, their quantization, their accuracy."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray

from deploykit import artifacts
from deploykit.data.classification import Example
from deploykit.data.sample import evenly
from deploykit.errors import ExportError, UsageError
from deploykit.evaluate import labelled_rows
from deploykit.export.calibration import calibrate
from deploykit.export.graphs import export_classifier, export_half_classifier
from deploykit.export.parity import check_parity
from deploykit.export.quantize import QuantizedCount, Ranges, Scheme, quantize
from deploykit.export.run import ExportOptions, Say, Written, pick_rows
from deploykit.export.search import Search, fewest_in_fp32, too_lossy
from deploykit.export.smooth_quant import Scales, SmoothedCount, smooth, smoothing_scales
from deploykit.export.tables import render
from deploykit.export.tensorrt import GRAPHS, EngineOptions, build_engine, plan
from deploykit.export.trained_ranges import trained_ranges
from deploykit.finetune.checkpoint import TorchClassifier
from deploykit.finetune.qat import TrainedScales
from deploykit.metrics import classification_metrics
from deploykit.runtime.classifier import load_classifier
from deploykit.runtime.engines import ENGINES, Engine, Precision, load_engine
from deploykit.runtime.engines.tensorrt import EngineRecord, runs_here

_SCHEMES: tuple[Scheme, ...] = ("s8s8", "u8s8")
_SENSITIVITY_ROWS = 64
_SAMPLES = 64
_HALF = {"fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Accuracy:
    """One line of the accuracy table: the same rows through one graph and engine.

    ``agreement`` is the share of rows answered as the checkpoint answers them.
    """

    precision: str
    engine: str
    accuracy: float
    macro_f1: float
    agreement: float
    int8_kernels: int


def write(checkpoint: Path, directory: Path, options: ExportOptions, say: Say) -> Written:
    """Write the graphs of a classifier and what serving them needs to ``directory``."""
    reference = TorchClassifier.load(checkpoint)
    trained = TrainedScales.load(checkpoint)
    if trained is not None and (options.smooth_quant is not None or options.method != ExportOptions.method):
        raise UsageError(
            f"{checkpoint}: was trained for INT8 with ranges of its own, for which --method and --smooth-quant do nothing",
            "leave them out",
        )
    if options.trt is not None:
        plan(options.trt, {"length": reference.task.max_length})
    rows = _rows(checkpoint, reference, options.data, "test", options)
    rows = evenly(rows, options.measure_rows or len(rows))
    say(f"measuring on {len(rows):,} rows")
    say("exporting to ONNX")
    export_classifier(reference.model, directory / "model.onnx")
    reference.tokenizer.backend_tokenizer.save(str(directory / "tokenizer.json"))
    samples = (json.dumps(dataclasses.asdict(row), ensure_ascii=False) for row in evenly(rows, _SAMPLES))
    (directory / artifacts.SAMPLES).write_text("\n".join(samples) + "\n", encoding="utf-8")
    parity = check_parity(reference, load_engine("onnxruntime", directory / "model.onnx"), [row.text for row in rows])
    say(
        f"parity with PyTorch: logits differ by at most {parity.max_difference:.1e} (mean {parity.mean_difference:.1e}), "
        f"{parity.argmax_agreement:.0%} equal answers over {parity.rows} texts of {parity.shortest} to {parity.longest} "
        f"tokens, batches of {', '.join(map(str, parity.batch_sizes))}"
    )
    metrics: dict[str, Any] = {"parity": parity.to_json(), "rows": len(rows)}
    grader = _Grader(directory, reference, rows)
    grader.grade_checkpoint()
    for engine in _engines("fp32"):
        grader.grade("fp32", engine)
    ranges: Ranges = {}
    smoothing: Scales = {}
    if options.int8:
        metrics["quantization"], ranges, smoothing = _quantize(
            checkpoint, directory, reference, trained, options, grader, say
        )
    if options.trt is not None:
        metrics["engines"] = _build_engines(directory, reference, options, options.trt, ranges, smoothing, grader, say)
    metrics["test"] = grader.metrics
    metrics["accuracy_table"] = [dataclasses.asdict(line) for line in grader.table]
    for line in render(metrics["accuracy_table"]):
        say(line)
    return Written(reference.task, metrics)


class _Grader:
    """The same rows through PyTorch and every graph: ``table`` has a line for each, ``metrics`` all of its metrics."""

    def __init__(self, directory: Path, reference: TorchClassifier, rows: Sequence[Example]) -> None:
        self._directory, self._reference, self._task = directory, reference, reference.task
        self._texts = [row.text for row in rows]
        self._truth = self._task.targets([row.label for row in rows])
        self._lines: dict[str, Accuracy] = {}
        self.metrics: dict[str, Any] = {}
        self._answers: list[Any] = []

    @property
    def table(self) -> list[Accuracy]:
        return list(self._lines.values())

    def grade_checkpoint(self) -> None:
        scores = self._reference.scores(self._texts)
        self._answers = list(self._task.decide(scores))
        self._enter("fp32", "pytorch", scores, 0)

    def grade(self, precision: Precision, name: str) -> Accuracy:
        """Raises ExportError when the engine runs none of an INT8 graph's layers in INT8."""
        graph = self._directory / ENGINES[name].graphs[precision]
        engine = load_engine(name, graph)
        kernels = engine.int8_kernels() if precision == "int8" else 0
        if precision == "int8" and kernels == 0:
            raise ExportError(
                f"{graph.name}: {name} runs none of its layers in INT8", "this engine version ignores Q/DQ: upgrade it"
            )
        return self._enter(precision, name, self._scores(engine), kernels)

    def grade_for_tensorrt(self, precision: str) -> Accuracy:
        """The graph that an engine is built from, as ONNX Runtime computes it on the CPU."""
        engine = load_engine("onnxruntime", self._directory / GRAPHS[precision])
        return self._enter(f"trt {precision}", "onnxruntime", self._scores(engine), 0)

    def grade_engine(self, record: EngineRecord) -> Accuracy:
        """A TensorRT engine itself, on the GPU here."""
        engine = load_engine("tensorrt", self._directory / record.file)
        return self._enter(record.precision, "tensorrt", self._scores(engine), record.int8_gemms)

    def _scores(self, engine: Engine) -> NDArray[np.float32]:
        return load_classifier(self._directory, self._task, engine).scores(self._texts)

    def drop(self, line: Accuracy) -> float:
        """Points of macro-F1 that it loses to the checkpoint."""
        return 100 * (self.table[0].macro_f1 - line.macro_f1)

    def _enter(self, precision: str, name: str, scores: NDArray[np.float32], kernels: int) -> Accuracy:
        metrics = classification_metrics(self._task, self._truth, scores)
        agreement = float(np.mean([a == b for a, b in zip(self._task.decide(scores), self._answers)]))
        line = Accuracy(precision, name, metrics["accuracy"], metrics["macro_f1"], agreement, kernels)
        key = f"{name}-{precision}"
        self._lines[key], self.metrics[key] = line, metrics
        return line


class _Quantizer:
    """Writes the Q/DQ graph of one scheme, with some activations left as they are in ``model``."""

    def __init__(
        self,
        model: onnx.ModelProto,
        path: Path,
        scheme: Scheme,
        ranges: Ranges,
        *,
        embeddings: bool = True,
    ) -> None:
        self._model = model
        self._path, self._scheme, self._ranges, self._embeddings = path, scheme, ranges, embeddings

    def write(self, activations: Collection[str]) -> QuantizedCount:
        """Quantize the layers that read ``activations``."""
        ranges = {name: self._ranges[name] for name in self._ranges if name in activations}
        quantized, count = quantize(self._model, ranges, self._scheme, embeddings=self._embeddings)
        onnx.save(quantized, self._path)
        return count


def _quantize(
    checkpoint: Path, directory: Path, reference: TorchClassifier, trained: TrainedScales | None,
    options: ExportOptions, grader: _Grader, say: Say,
) -> tuple[dict[str, Any], Ranges, Scales]:  # fmt: skip
    """Write a Q/DQ graph for each engine; where one loses too much, with its most sensitive layers left in fp32.

    Returns what the manifest says of it, the ranges of the activations that are S8 (in OpenVINO's graph), and the scales
    of those that were smoothed.
    """
    examples = _rows(checkpoint, reference, options.calibration, options.calibration, options)
    picked = [example.text for example in evenly(examples, options.calibration_rows)]
    token_ids = reference.encode(picked)
    graph = directory / "model.onnx"
    smoothing: Scales = {}
    smoothed: SmoothedCount | None = None
    if options.smooth_quant is not None:
        smoothing = smoothing_scales(graph, token_ids, options.smooth_quant)
        graph, smoothed = _smooth(graph, smoothing, say)
    model = onnx.load(graph)
    say(f"calibrating on {len(picked):,} rows ({options.method})")
    calibration = calibrate(graph, token_ids, artifacts.digest_of(picked))
    if smoothed is not None:
        graph.unlink()
    method, ranges = str(options.method), calibration.ranges(options.method)
    if trained is not None:
        method, ranges = "trained", trained_ranges(trained, reference.model, model, ranges)
        say(f"{len(ranges)} activations have the ranges that the checkpoint was trained with")
    calibration.save(directory, method, ranges)
    quantizers = {scheme: _Quantizer(model, directory / f"model.{scheme}.onnx", scheme, ranges) for scheme in _SCHEMES}
    counts = {scheme: quantizer.write(ranges) for scheme, quantizer in quantizers.items()}
    whole = counts[_SCHEMES[0]]
    if whole.linear_layers == 0:
        raise ExportError(
            "no layer could be quantized: the graph has no MatMul or Gemm with a constant weight",
            "export without --int8; this architecture is not supported yet",
        )
    say(
        f"quantized {whole.linear_layers} linear layers ({whole.quantize_nodes} QuantizeLinear, "
        f"{whole.dequantize_nodes} DequantizeLinear nodes) and {whole.embeddings} embedding tables"
    )
    say("measuring accuracy")
    train = f"deploykit finetune --model {shlex.quote(str(checkpoint))} --qat"
    remedy = f"--smooth-quant, more --calibration-rows, train the model for INT8 ({train} --out RUN)"
    searches: dict[str, Search] = {}
    kept: dict[Scheme, Collection[str]] = {}
    for engine in _engines("int8"):
        drop = grader.drop(grader.grade("int8", engine))
        if drop > options.max_drop:
            loss = f"INT8 on {engine} loses {drop:.2f} points of macro-F1"
            say(f"{loss}: which layers need fp32?")
            scheme = next(s for s in _SCHEMES if ENGINES[engine].graphs["int8"] == f"model.{s}.onnx")
            sample = evenly(picked, _SENSITIVITY_ROWS)
            searches[engine] = _search(
                directory, reference, quantizers[scheme], ranges, engine, loss, sample, options, grader, remedy, say
            )
            kept[scheme] = searches[engine].kept
    record = {
        **dataclasses.asdict(whole),
        "method": method,
        "calibration_rows": len(picked),
        "smooth_quant": {"alpha": options.smooth_quant, **dataclasses.asdict(smoothed)} if smoothed else None,
        "search": {engine: dataclasses.asdict(search) for engine, search in searches.items()},
    }
    return record, {name: limits for name, limits in ranges.items() if name not in kept.get("s8s8", ())}, smoothing


def _smooth(graph: Path, scales: Scales, say: Say) -> tuple[Path, SmoothedCount]:
    """Write ``graph`` with smoothed activations beside it, for its calibration. Raises ExportError where it has none."""
    if not scales:
        raise ExportError("--smooth-quant: no layer norm of this model feeds a linear layer", "leave it out")
    model, count = smooth(onnx.load(graph), scales)
    say(f"SmoothQuant: {count.folded} activations by the norm before them, {count.multiplied} by a Mul of their own")
    path = graph.with_name("smoothed.onnx")
    onnx.save(model, path)
    return path, count


def _search(
    directory: Path, reference: TorchClassifier, quantizer: _Quantizer, ranges: Collection[str], engine: str, loss: str,
    texts: Sequence[str], options: ExportOptions, grader: _Grader, remedy: str, say: Say,
) -> Search:  # fmt: skip
    """Leave as few activations in fp32 as hold the limit, those first that change scores most when they alone are INT8.

    ``loss`` says what is lost with all of them in INT8, as ``grader`` has it.
    """

    def scores(precision: Precision) -> NDArray[np.float32]:
        graph = directory / ENGINES[engine].graphs[precision]
        return load_classifier(directory, reference.task, load_engine(engine, graph)).scores(texts)

    table = grader.table
    expected = scores("fp32")
    sensitivity = {}
    for name in ranges:
        if not quantizer.write([name]).linear_layers:
            continue
        sensitivity[name] = float(np.abs(scores("int8") - expected).mean())
    order = sorted(sensitivity, key=lambda name: -sensitivity[name])

    def drop(kept: Sequence[str]) -> float:
        quantizer.write(set(ranges) - set(kept))
        return grader.drop(grader.grade("int8", engine))

    try:
        return fewest_in_fp32(order, drop, options.max_drop, say=say)
    except ExportError as error:
        raise too_lossy(loss, options.max_drop, table, error, remedy) from error


def _build_engines(
    directory: Path, reference: TorchClassifier, options: ExportOptions, trt: EngineOptions, ranges: Ranges,
    smoothing: Scales, grader: _Grader, say: Say,
) -> list[dict[str, Any]]:  # fmt: skip
    """Write a graph of each precision in TensorRT's terms, grade what a CPU can compute of it, and build its engine,
    which is graded too where it runs here.

    INT8 is Q/DQ in the fp16 graph, smoothed as the ranges were calibrated, of the activations that have ``ranges``.
    """
    limits = {"length": reference.task.max_length}
    built = []
    for precision in trt.precisions:
        graph = directory / GRAPHS[precision]
        if precision in _HALF:
            export_half_classifier(reference.model, graph, _HALF[precision])
        elif precision == "int8":
            half = directory / "half.onnx"
            export_half_classifier(reference.model, half, torch.float16)
            model, _ = smooth(onnx.load(half), smoothing)
            count = _Quantizer(model, graph, "s8s8", ranges, embeddings=False).write(ranges)
            half.unlink()
            say(f"{graph.name}: {count.linear_layers} linear layers in INT8, the rest in fp16")
        if precision in ("fp16", "int8"):
            _refuse_loss(grader, grader.grade_for_tensorrt(precision), graph.name, options.max_drop)
        calibration = artifacts.digest_of(ranges) if precision == "int8" else None
        record = build_engine(graph, precision, trt, limits, say, calibration)
        if runs_here(directory / record.file):
            _refuse_loss(grader, grader.grade_engine(record), record.file, options.max_drop)
        built.append(record)
    return [dataclasses.asdict(record) for record in built]


def _refuse_loss(grader: _Grader, line: Accuracy, name: str, max_drop: float) -> None:
    if grader.drop(line) > max_drop:
        raise ExportError(
            f"{name} loses {grader.drop(line):.2f} points of macro-F1, more than --max-drop {max_drop}",
            "leave this --precision out, try another --method, or raise --max-drop; nothing was written",
        )


def _engines(precision: Precision) -> list[str]:
    """Those installed that have a graph in ``precision``."""
    return [name for name, info in ENGINES.items() if info.installed and precision in info.graphs]


def _rows(
    checkpoint: Path, reference: TorchClassifier, source: str | None, split: str, options: ExportOptions
) -> list[Example]:
    """Labelled rows from a file, or from the run's own splits."""

    def read_file(path: str, part: str) -> list[Example]:
        return labelled_rows(path, reference.task, encoding=options.encoding, split=part).examples

    return pick_rows(checkpoint, source, split, Example, read_file)
