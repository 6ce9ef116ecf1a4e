"""What the export of a text classifier is made of: its graphs, their quantization, their accuracy."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from deploykit import artifacts
from deploykit.data.classification import Example
from deploykit.errors import ExportError
from deploykit.evaluate import labelled_rows
from deploykit.export.calibration import calibrate
from deploykit.export.graphs import export_classifier
from deploykit.export.parity import check_parity
from deploykit.export.quantize import Scheme, quantize
from deploykit.export.run import ExportOptions, Say, Written, evenly, pick_rows
from deploykit.export.tables import render
from deploykit.finetune.checkpoint import TorchClassifier
from deploykit.metrics import classification_metrics
from deploykit.runtime.classifier import load_classifier
from deploykit.runtime.engines import ENGINES, Precision, load_engine

_SCHEMES: tuple[Scheme, ...] = ("s8s8", "u8s8")


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
    rows = _rows(checkpoint, reference, options.data, "test", options)
    rows = evenly(rows, options.measure_rows or len(rows))
    say(f"measuring on {len(rows):,} rows")
    say("exporting to ONNX")
    export_classifier(reference.model, directory / "model.onnx")
    reference.tokenizer.backend_tokenizer.save(str(directory / "tokenizer.json"))
    parity = check_parity(reference, load_engine("onnxruntime", directory / "model.onnx"), [row.text for row in rows])
    say(
        f"parity with PyTorch: logits differ by at most {parity.max_difference:.1e} (mean {parity.mean_difference:.1e}), "
        f"{parity.argmax_agreement:.0%} equal answers over {parity.rows} texts of {parity.shortest} to {parity.longest} "
        f"tokens, batches of {', '.join(map(str, parity.batch_sizes))}"
    )
    metrics: dict[str, Any] = {"parity": parity.to_json(), "rows": len(rows)}
    if options.int8:
        metrics["quantization"] = _quantize(checkpoint, directory, reference, options, say)
    say("measuring accuracy")
    table, metrics["test"] = _measure(directory, reference, rows, say)
    metrics["accuracy_table"] = [dataclasses.asdict(line) for line in table]
    for line in render(metrics["accuracy_table"]):
        say(line)
    _guard(table, options.max_drop)
    return Written(reference.task, metrics)


def _quantize(
    checkpoint: Path, directory: Path, reference: TorchClassifier, options: ExportOptions, say: Say
) -> dict[str, Any]:
    examples = _rows(checkpoint, reference, options.calibration, options.calibration, options)
    picked = [example.text for example in evenly(examples, options.calibration_rows)]
    say(f"calibrating on {len(picked):,} rows ({options.method})")
    calibration = calibrate(directory / "model.onnx", reference.encode(picked), artifacts.digest_of(picked))
    calibration.save(directory, options.method)
    model = onnx.load(directory / "model.onnx")
    count = None
    for scheme in _SCHEMES:
        quantized, count = quantize(model, calibration.ranges(options.method), scheme)
        onnx.save(quantized, directory / f"model.{scheme}.onnx")
    if count is None or count.linear_layers == 0:
        raise ExportError(
            "no layer could be quantized: the graph has no MatMul or Gemm with a constant weight",
            "export without --int8; this architecture is not supported yet",
        )
    say(
        f"quantized {count.linear_layers} linear layers ({count.quantize_nodes} QuantizeLinear, "
        f"{count.dequantize_nodes} DequantizeLinear nodes) and {count.embeddings} embedding tables"
    )
    return {**dataclasses.asdict(count), "method": options.method, "calibration_rows": len(picked)}


def _measure(
    directory: Path, reference: TorchClassifier, rows: Sequence[Example], say: Say
) -> tuple[list[Accuracy], dict[str, Any]]:
    """The same rows through PyTorch and every graph; returns the table and the full metrics of the
    last graph (the one that is packaged first)."""
    task = reference.task
    texts, truth = [row.text for row in rows], task.targets([row.label for row in rows])
    expected = reference.scores(texts)
    answers = task.decide(expected)
    metrics = classification_metrics(task, truth, expected)
    table = [Accuracy("fp32", "pytorch", metrics["accuracy"], metrics["macro_f1"], 1.0, 0)]
    full = {"pytorch-fp32": metrics}
    precisions: tuple[Precision, ...] = ("fp32", "int8")
    for precision in precisions:
        for name, info in ENGINES.items():
            graph = directory / info.graphs[precision]
            if not info.installed or not graph.exists():
                continue
            engine = load_engine(name, graph)
            kernels = engine.int8_kernels() if precision == "int8" else 0
            if precision == "int8" and kernels == 0:
                raise ExportError(
                    f"{graph.name}: {name} runs none of its layers in INT8",
                    "this engine version ignores Q/DQ: upgrade it",
                )
            scores = load_classifier(directory, task, engine).scores(texts)
            metrics = classification_metrics(task, truth, scores)
            agreement = float(np.mean([a == b for a, b in zip(task.decide(scores), answers)]))
            table.append(Accuracy(precision, name, metrics["accuracy"], metrics["macro_f1"], agreement, kernels))
            full[f"{name}-{precision}"] = metrics
    return table, full


def _guard(table: Sequence[Accuracy], max_drop: float) -> None:
    reference = table[0].macro_f1
    for line in table:
        drop = 100 * (reference - line.macro_f1)
        if line.precision == "int8" and drop > max_drop:
            raise ExportError(
                f"INT8 on {line.engine} loses {drop:.2f} points of macro-F1, more than --max-drop {max_drop}:\n"
                + "\n".join("  " + text for text in render([dataclasses.asdict(each) for each in table])),
                "try another --method, more --calibration-rows, or export without --int8; nothing was written",
            )


def _rows(
    checkpoint: Path, reference: TorchClassifier, source: str | None, split: str, options: ExportOptions
) -> list[Example]:
    """Labelled rows from a file, or from the run's own splits."""

    def read_file(path: str, part: str) -> list[Example]:
        return labelled_rows(path, reference.task, encoding=options.encoding, split=part).examples

    return pick_rows(checkpoint, source, split, Example, read_file)
