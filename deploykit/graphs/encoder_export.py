"""Quantize, grade and build the graphs of an encoder: the common part of exports with one such graph."""

from __future__ import annotations

import contextlib
import dataclasses
from abc import abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray

from deploykit import artifacts
from deploykit.artifacts import write_refusal
from deploykit.errors import DeploykitError, ExportError, first_line
from deploykit.graphs.export_options import ExportOptions, Say
from deploykit.measurement_log import MeasurementLog
from deploykit.quantization.calibration import Calibration
from deploykit.quantization.encoder import (
    GRAPH,
    SCHEMES,
    Calibrated,
    GraphQuantizer,
    Quantizer,
    TokenRows,
    activations_of,
    calibrate_smoothed,
)
from deploykit.quantization.grading import Grader, Line, Raw
from deploykit.quantization.qdq import Ranges
from deploykit.quantization.search import Search, hold_limit
from deploykit.quantization.smooth_quant import Scales, smooth
from deploykit.runtime.engines import ENGINES, load_engine
from deploykit.runtime.engines.protocol import Engine, Precision
from deploykit.runtime.engines.tensorrt import EngineRecord, runs_here
from deploykit.tensorrt.build import CLASSIFIER_INPUTS, Inputs, build_engine
from deploykit.tensorrt.options import GRAPHS, EngineOptions, Limits

_HALF = {"fp16": torch.float16, "bf16": torch.bfloat16}


class EncoderGrader(Grader[Raw]):
    """Grades the graphs of an export in ``directory`` on each engine."""

    def __init__(self, directory: Path) -> None:
        super().__init__()
        self._directory = directory

    @abstractmethod
    def outputs(self, engine: Engine) -> Raw:
        """Return the outputs of an engine for the rows."""

    @abstractmethod
    def sample_outputs(self, engine: Engine) -> NDArray[np.float32]:
        """Return the outputs of an engine for some of the rows, as numbers that measure the distance of two forms."""

    def lost_without_labels(self, engine: Engine) -> float:
        """Return the points that an engine loses by ``label_free``. For graders that have it."""
        raise NotImplementedError

    def _without_labels(self, name: str, graph: Path) -> Callable[[], float] | None:
        # The engine is loaded again: the table's lines would keep every engine in memory.
        return (lambda: self.lost_without_labels(load_engine(name, graph))) if self.label_free else None

    def check_fp32(self, outputs: Raw, name: str) -> None:
        """Raise ExportError if the fp32 outputs of the form ``name`` differ from PyTorch's. The default checks nothing."""

    def grade(self, precision: Precision, name: str) -> Line:
        """Grade an engine's outputs. Raises ExportError when ``check_fp32`` does, or no layer of an INT8 graph runs in INT8."""
        graph = self._directory / ENGINES[name].graphs[precision]
        with running(graph.name, name):
            engine = load_engine(name, graph)
            outputs = self.outputs(engine)
        kernels = engine.int8_kernels() if precision == "int8" else 0
        if precision == "int8" and kernels == 0:
            raise ExportError(
                f"{graph.name}: {name} runs none of its layers in INT8", "this engine version ignores Q/DQ: upgrade it"
            )
        if precision == "fp32":
            self.check_fp32(outputs, f"{graph.name} on {name}")
        return self.enter(precision, name, outputs, kernels, self._without_labels(name, graph))

    def grade_for_tensorrt(self, precision: str) -> Line:
        """Grade the graph that an engine is built from, as ONNX Runtime computes it on the CPU."""
        graph = self._directory / GRAPHS[precision]
        outputs = self.outputs(load_engine("onnxruntime", graph))
        without_labels = self._without_labels("onnxruntime", graph)
        return self.enter(f"trt {precision}", "onnxruntime", outputs, without_labels=without_labels)

    def grade_engine(self, record: EngineRecord) -> Line:
        """Grade a TensorRT engine itself, on the GPU here."""
        graph = self._directory / record.file
        outputs = self.outputs(load_engine("tensorrt", graph))
        return self.enter(
            record.precision, "tensorrt", outputs, record.int8_gemms, self._without_labels("tensorrt", graph)
        )

    def sample(self, precision: Precision, name: str) -> NDArray[np.float32]:
        """Return ``sample_outputs`` of the graph in ``precision`` on the engine ``name``."""
        return self.sample_outputs(load_engine(name, self._directory / ENGINES[name].graphs[precision]))


@contextlib.contextmanager
def running(graph: str, engine: str) -> Iterator[None]:
    """Raise ExportError for any exception of an engine that cannot load or run a graph."""
    try:
        yield
    except Exception as error:  # engines' exceptions have no common base
        if isinstance(error, (DeploykitError, MemoryError)) or write_refusal(error):
            raise
        raise ExportError(
            f"{graph} does not run on {engine}: {first_line(error)}",
            "this architecture is not supported; see the page 'What has been run where' in the docs",
        ) from error


def engines_for(precision: Precision) -> list[str]:
    """Return the engines installed that have a graph in ``precision``."""
    return [name for name, info in ENGINES.items() if info.installed and precision in info.graphs]


def calibrated(
    directory: Path, saved: Calibration | None, rows: Callable[[], TokenRows], options: ExportOptions, say: Say
) -> Calibrated:
    """Take the ``saved`` calibration of the fp32 graph in ``directory``, or calibrate it on ``rows``.

    Raises ExportError if SmoothQuant finds nothing to smooth.
    """
    graph = directory / GRAPH
    if saved is not None:
        saved.check(activations_of(graph))
        return Calibrated(onnx.load(graph), saved)
    token_rows = rows()
    say(f"calibrating on {options.calibration}")
    return calibrate_smoothed(graph, token_rows, options.smooth_quant, say)


def quantize_graphs(
    found: Calibrated, method: str, ranges: Ranges, directory: Path, options: ExportOptions, grader: EncoderGrader[Any],
    remedy: str, trace: MeasurementLog, say: Say, others: Callable[[], Mapping[str, Quantizer]] = dict,
) -> tuple[dict[str, Any], Ranges]:  # fmt: skip
    """Write a Q/DQ graph for each engine; if one loses too much, leave its most sensitive layers in fp32.

    ``others`` has, by file, other quantizers, which have already written all their parts in INT8. Returns the record for the manifest,
    and the ranges of the activations that are S8 (in OpenVINO's graph).
    """
    calibration = found.calibration
    calibration.save(directory)
    calibration.save_ranges(directory, method, ranges)
    graphs = {
        f"model.{scheme}.onnx": GraphQuantizer(found.model, directory / f"model.{scheme}.onnx", scheme, ranges)
        for scheme in SCHEMES
    }
    whole, *_ = [quantizer.write(ranges) for quantizer in graphs.values()]
    say(
        f"quantized {whole.linear_layers} linear layers ({whole.quantize_nodes} QuantizeLinear, "
        f"{whole.dequantize_nodes} DequantizeLinear nodes) and {whole.embeddings} embedding {'table' if whole.embeddings == 1 else 'tables'}"
    )
    quantizers: dict[str, Quantizer] = {**graphs, **others()}
    say("measuring accuracy")
    searches: dict[str, Search] = {}
    kept: dict[str, Collection[str]] = {}
    for engine in engines_for("int8"):
        file = ENGINES[engine].graphs["int8"]
        if file not in quantizers:
            continue
        search = _hold_limit(engine, quantizers[file], options, grader, remedy, trace, say)
        if search is not None:
            searches[engine], kept[file] = search, search.kept
    smoothed = found.smoothed
    record = {
        **dataclasses.asdict(whole),
        "method": method,
        "calibration": calibration.to_json(),
        "smooth_quant": {"alpha": options.smooth_quant, **dataclasses.asdict(smoothed)} if smoothed else None,
        "search": {engine: dataclasses.asdict(search) for engine, search in searches.items()},
    }
    return record, {name: limits for name, limits in ranges.items() if name not in kept.get("model.s8s8.onnx", ())}


def _hold_limit(
    engine: str, quantizer: Quantizer, options: ExportOptions, grader: EncoderGrader[Any], remedy: str, trace: MeasurementLog,
    say: Say,
) -> Search | None:  # fmt: skip
    """Leave the fewest of the quantizer's parts in fp32 that keep the loss within the limit."""

    def write(kept: Collection[str]) -> Line:
        quantizer.write(set(quantizer.parts) - set(kept))
        return grader.grade("int8", engine)

    def sample(parts: Collection[str]) -> NDArray[np.float32]:
        quantizer.write(parts)
        return grader.sample("int8", engine)

    return hold_limit(f"INT8 on {engine}", quantizer.parts, write, sample, grader, options.max_drop, trace, say, remedy)


def build_engines(
    directory: Path, write_half: Callable[[Path, torch.dtype], None], limits: Limits, options: ExportOptions,
    trt: EngineOptions, ranges: Ranges, smoothing: Scales, grader: EncoderGrader[Any], say: Say,
    inputs: Inputs = CLASSIFIER_INPUTS,
) -> list[dict[str, Any]]:  # fmt: skip
    """Write a graph of each precision for TensorRT, grade it on the CPU if possible, and build its engine,
    which is graded too if it runs here.

    ``write_half`` writes the model's graph in float16 or bfloat16. INT8 is Q/DQ in the fp16 graph, smoothed as the ranges
    were calibrated, of the activations that have ``ranges``.
    """
    built = []
    for precision in trt.precisions:
        graph = directory / GRAPHS[precision]
        if precision in _HALF:
            write_half(graph, _HALF[precision])
        elif precision == "int8":
            half = directory / "half.onnx"
            write_half(half, torch.float16)
            model, _ = smooth(onnx.load(half), smoothing)
            count = GraphQuantizer(model, graph, "s8s8", ranges, embeddings=False).write(ranges)
            half.unlink()
            say(f"{graph.name}: {count.linear_layers} linear layers in INT8, the rest in fp16")
        remedy = "leave this --precision out, try another --method"
        if precision in ("fp16", "int8"):
            grader.refuse_loss(grader.grade_for_tensorrt(precision), graph.name, options.max_drop, remedy, say)
        calibration = artifacts.digest_of(ranges) if precision == "int8" else None
        record = build_engine(graph, precision, trt, limits, say, calibration, inputs=inputs)
        if runs_here(directory / record.file):
            grader.refuse_loss(grader.grade_engine(record), record.file, options.max_drop, remedy, say)
        built.append(record)
    return [dataclasses.asdict(record) for record in built]
