"""Export a token classifier: its graphs, compared with PyTorch, quantized and measured."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from tokenizers import Tokenizer

from deploykit.artifacts import digest_of
from deploykit.data.sample import evenly
from deploykit.errors import ExportError, UsageError
from deploykit.graphs.export_options import CalibrationOptions, ExportOptions, Say, Written, keep_samples, pick_rows
from deploykit.graphs.onnx_export import export_classifier
from deploykit.measurement_log import Trace
from deploykit.quantization.activations import show_activations
from deploykit.quantization.calibration import Calibration, collect
from deploykit.quantization.grading import Grader, Line
from deploykit.quantization.qdq import Scheme, linear_layers, quantize
from deploykit.quantization.search import SAMPLE, hold_limit
from deploykit.quantization.tables import render
from deploykit.runtime.engines import ENGINES, load_engine
from deploykit.runtime.engines.protocol import Precision
from token_classification.checkpoint import TorchTagger
from token_classification.entities import entity_metrics
from token_classification.evaluate import labelled_rows
from token_classification.facts import TokenClassification
from token_classification.rows import Example
from token_classification.tagger import Array, Tagger, WordTokenizer, decide, load_tagger

_GRAPH = "model.onnx"
_SCHEMES: dict[str, Scheme] = {"model.s8s8.onnx": "s8s8", "model.u8s8.onnx": "u8s8"}
_TOLERANCE = 1e-3
_PARITY_ROWS = 64


def write(
    checkpoint: Path, directory: Path, options: ExportOptions, saved: Calibration | None, trace: Trace, say: Say
) -> Written:
    """Write the graphs and what serving them needs to ``directory``; without ``saved``, calibrate."""
    if options.trt is not None or options.smooth_quant is not None:
        raise UsageError("--trt and --smooth-quant are not for token classification", "leave them out")
    reference = TorchTagger.load(checkpoint)
    task = reference.task
    rows = _rows(checkpoint, task, options.data, "test", options)
    rows = evenly(rows, options.measure_rows or len(rows))
    say(f"measuring on {len(rows):,} rows")
    _write_fp32(reference, directory)
    keep_samples(directory, rows)
    parity = _check_parity(reference, directory, rows)
    say(f"parity with PyTorch: logits differ by at most {parity['max_difference']:.1e} over {parity['rows']} texts")
    grader = _Grader(directory, task, rows)
    grader.enter("fp32", "pytorch", reference.word_logits(grader.texts))
    for engine in _engines("fp32"):
        grader.grade("fp32", engine)
    metrics: dict[str, Any] = {"parity": parity, "rows": len(rows)}
    if options.int8:
        calibration = saved or calibrate(directory, task, calibration_texts(checkpoint, task, options))
        metrics["quantization"] = _quantize(directory, calibration, options, grader, trace, say)
    metrics["test"] = grader.metrics
    metrics["accuracy_table"] = [line.to_json() for line in grader.table]
    for line in render(metrics["accuracy_table"]):
        say(line)
    return Written(task, metrics)


def write_fp32(checkpoint: Path, directory: Path, options: CalibrationOptions) -> TokenClassification:
    """Write what ``calibrate`` reads of a checkpoint."""
    reference = TorchTagger.load(checkpoint)
    _write_fp32(reference, directory)
    return reference.task


def calibration_texts(source: Path, task: TokenClassification, options: CalibrationOptions) -> list[str]:
    """Return rows of a file, or of the splits of the checkpoint ``source``."""
    rows = _rows(source, task, options.calibration, options.calibration, options)
    return [row.words for row in evenly(rows, options.calibration_rows)]


def calibrate(folder: Path, task: TokenClassification, texts: Sequence[str]) -> Calibration:
    """Run ``texts`` through the fp32 graph in ``folder`` and collect what goes into its linear layers."""
    tokenizer = WordTokenizer(Tokenizer.from_file(str(folder / "tokenizer.json")), task.max_length)
    token_ids, _ = tokenizer.encode(texts)
    graph = folder / _GRAPH
    return collect(lambda observe: show_activations(graph, token_ids, observe), len(token_ids), digest_of(list(texts)))


class _Grader(Grader[list[Array]]):
    """Measures the logits of each row's words, float32 [words, labels]."""

    figures = ("accuracy", "entity_f1")
    limited = ("entity_f1",)

    def __init__(self, directory: Path, task: TokenClassification, rows: Sequence[Example]) -> None:
        super().__init__()
        self._directory, self._task = directory, task
        self.texts = [row.words for row in rows]
        self._truth = [row.labels.split() for row in rows]

    def measure(self, raw: list[Array]) -> dict[str, Any]:
        return entity_metrics(self._truth, decide(self._task, raw))

    def answers(self, raw: list[Array]) -> list[str]:
        return [" ".join(labels) for labels in decide(self._task, raw)]

    def grade(self, precision: Precision, name: str) -> Line:
        """Raises ExportError when the engine runs none of an INT8 graph's layers in INT8."""
        graph = self._directory / ENGINES[name].graphs[precision]
        engine = load_engine(name, graph)
        kernels = engine.int8_kernels() if precision == "int8" else 0
        if precision == "int8" and not kernels:
            raise ExportError(f"{graph.name}: {name} runs none of its layers in INT8", "upgrade the engine")
        return self.enter(precision, name, self._tagger(precision, name).word_logits(self.texts), kernels)

    def sample(self, name: str) -> Array:
        """Return the logits of some rows' words with the INT8 graph, float32 [words, labels]."""
        return np.concatenate(self._tagger("int8", name).word_logits(evenly(self.texts, SAMPLE)))

    def _tagger(self, precision: Precision, name: str) -> Tagger:
        engine = load_engine(name, self._directory / ENGINES[name].graphs[precision])
        return load_tagger(self._directory, self._task, engine)


def _write_fp32(reference: TorchTagger, directory: Path) -> None:
    export_classifier(reference.model, directory / _GRAPH)
    reference.hub_tokenizer.backend_tokenizer.save(str(directory / "tokenizer.json"))


def _check_parity(reference: TorchTagger, directory: Path, rows: Sequence[Example]) -> dict[str, Any]:
    """Compare fp32 logits. Raises ExportError with the difference when they are not the same."""
    texts = [row.words for row in evenly(rows, _PARITY_ROWS)]
    tagger = load_tagger(directory, reference.task, load_engine("onnxruntime", directory / _GRAPH))
    pairs = zip(reference.word_logits(texts), tagger.word_logits(texts))
    difference = max(float(np.abs(expected - actual).max()) for expected, actual in pairs)
    if not difference <= _TOLERANCE:  # "not <=" catches NaN too
        raise ExportError(
            f"the ONNX graph differs from the PyTorch model: logits by up to {difference:.2g}",
            "this architecture does not export faithfully; nothing was written",
        )
    return {"rows": len(texts), "max_difference": difference}


def _quantize(
    directory: Path, calibration: Calibration, options: ExportOptions, grader: _Grader, trace: Trace, say: Say
) -> dict[str, Any]:
    """Write a Q/DQ graph for each engine, with the most sensitive layers in fp32 where one loses too much."""
    model = onnx.load(directory / _GRAPH)
    calibration.check({layer.activation for layer in linear_layers(model)})
    ranges = calibration.ranges(options.method)
    calibration.save(directory)
    calibration.save_ranges(directory, options.method, ranges)
    searches, whole = {}, None
    for engine in _engines("int8"):
        file = ENGINES[engine].graphs["int8"]
        if file not in _SCHEMES:
            continue

        def put(parts: Collection[str], file: str = file) -> Any:
            chosen = {name: ranges[name] for name in ranges if name in parts}
            quantized, count = quantize(model, chosen, _SCHEMES[file])
            onnx.save(quantized, directory / file)
            return count

        def grade(kept: Collection[str], engine: str = engine, put: Any = put) -> Line:
            put(set(ranges) - set(kept))
            return grader.grade("int8", engine)

        def sample(part: str | None, engine: str = engine, put: Any = put) -> Array:
            put([] if part is None else [part])
            return grader.sample(engine)

        whole = put(ranges)
        say(f"{file}: {whole.linear_layers} linear layers in INT8")
        search = hold_limit(f"INT8 on {engine}", list(ranges), grade, sample, grader, options.max_drop, trace, say)
        if search is not None:
            searches[engine] = dataclasses.asdict(search)
    return {
        **(dataclasses.asdict(whole) if whole else {}),
        "method": options.method,
        "calibration": calibration.to_json(),
        "search": searches,
    }


def _engines(precision: Precision) -> list[str]:
    """The engines installed here that run a graph in ``precision``."""
    return [
        name for name, info in ENGINES.items() if info.installed and info.graphs.get(precision) in (_GRAPH, *_SCHEMES)
    ]


def _rows(
    folder: Path, task: TokenClassification, source: str | None, split: str, options: CalibrationOptions
) -> list[Example]:
    """Labelled rows from a file, or from the splits of the run in ``folder``."""

    def read_file(path: str, part: str) -> list[Example]:
        return labelled_rows(path, task, None, None, options.encoding, part).examples

    return pick_rows(folder, source, split, Example, read_file)
