"""Export a text classifier: checkpoint in; ONNX, optionally INT8, checked and measured, out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from deploykit import artifacts
from deploykit.data.classification import Example
from deploykit.errors import DataError, ExportError, UsageError
from deploykit.evaluate import labelled_rows
from deploykit.export.calibration import METHODS, Calibration, Method, calibrate
from deploykit.export.graphs import export_classifier
from deploykit.export.parity import check_parity
from deploykit.export.quantize import Scheme, quantize
from deploykit.finetune.checkpoint import TorchClassifier, check_source
from deploykit.finetune.classification import read_split
from deploykit.metrics import classification_metrics
from deploykit.runtime.classifier import load_classifier
from deploykit.runtime.engines import ENGINES, Precision, load_engine

Say = Callable[[str], None]

_SCHEMES: tuple[Scheme, ...] = ("s8s8", "u8s8")


@dataclass(frozen=True)
class ExportOptions:
    """``calibration`` is the name of one of the run's splits or a data file; ``data`` a file of
    labelled rows to measure on (default: the run's test rows). ``max_drop`` is in points of
    macro-F1 (of 100)."""

    int8: bool = False
    calibration: str = "train"
    calibration_rows: int = 512
    method: Method = "minmax"
    max_drop: float = 0.5
    data: str | None = None
    encoding: str | None = None

    def check(self) -> None:
        if self.method not in METHODS:
            raise UsageError(f"unknown --method {self.method!r}", f"choose one of: {', '.join(METHODS)}")
        if self.calibration_rows < 1:
            raise UsageError(f"--calibration-rows is {self.calibration_rows}", "give 1 or more")
        if not 0 <= self.max_drop <= 100:
            raise UsageError(f"--max-drop is {self.max_drop}", "give points from 0 to 100")


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


@dataclass(frozen=True)
class Exported:
    out: Path
    manifest: artifacts.Manifest
    reused: bool


def export(checkpoint: Path, out: Path, options: ExportOptions, *, force: bool = False, say: Say) -> Exported:
    """Write fp32 ONNX and, with ``int8``, a Q/DQ graph for each target, each measured on the same rows.

    Raises ExportError, leaving nothing at ``out``, when the graph differs from PyTorch, when an
    engine runs no INT8 kernel, or when INT8 costs more than ``max_drop`` points of macro-F1.
    """
    options.check()
    check_source(str(checkpoint))
    inputs = _digest(checkpoint, options)
    if (manifest := artifacts.existing(out, "export", inputs, force=force)) is not None:
        return Exported(out, manifest, reused=True)
    reference = TorchClassifier.load(checkpoint)
    task = reference.task
    rows = _rows(checkpoint, reference, options.data, "test", options)
    say(f"measuring on {len(rows):,} rows")
    with artifacts.new_directory(out) as directory:
        say("exporting to ONNX")
        export_classifier(reference.model, directory / "model.onnx")
        reference.tokenizer.backend_tokenizer.save(str(directory / "tokenizer.json"))
        parity = check_parity(
            reference, load_engine("onnxruntime", directory / "model.onnx"), [row.text for row in rows]
        )
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
        for line in render(table):
            say(line)
        _guard(table, options.max_drop)
        manifest = artifacts.write_manifest(
            directory,
            "export",
            task,
            inputs=inputs,
            parent=_parent(checkpoint),
            options=dataclasses.asdict(options),
            metrics=metrics,
        )
    return Exported(out, manifest, reused=False)


def render(table: Sequence[Accuracy]) -> list[str]:
    """The accuracy table as lines of text."""
    lines = [f"{'precision':<10}{'engine':<14}{'accuracy':>9}{'macro-F1':>10}{'agreement':>11}{'INT8 kernels':>14}"]
    for line in table:
        lines.append(
            f"{line.precision:<10}{line.engine:<14}{line.accuracy:>9.4f}{line.macro_f1:>10.4f}"
            f"{line.agreement:>11.4f}{line.int8_kernels:>14}"
        )
    return lines


def _quantize(
    checkpoint: Path, directory: Path, reference: TorchClassifier, options: ExportOptions, say: Say
) -> dict[str, Any]:
    examples = _rows(checkpoint, reference, options.calibration, options.calibration, options)
    texts = [e.text for e in examples]
    # Evenly spaced rows: files are often sorted, and the first rows would then be of one kind.
    picked = [texts[i] for i in np.linspace(0, len(texts) - 1, min(options.calibration_rows, len(texts))).astype(int)]
    say(f"calibrating on {len(picked):,} rows ({options.method})")
    calibration: Calibration = calibrate(
        directory / "model.onnx", reference.encode(picked), artifacts.digest_of(picked), progress=lambda done, of: None
    )
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
                + "\n".join("  " + text for text in render(table)),
                "try another --method, more --calibration-rows, or export without --int8; nothing was written",
            )


def _rows(
    checkpoint: Path, reference: TorchClassifier, source: str | None, split: str, options: ExportOptions
) -> list[Example]:
    """Cleaned labelled rows from a file, or from the run's own splits."""
    if source is None or (not Path(source).exists() and source in ("train", "validation", "test")):
        name = source or split
        if (checkpoint / "splits" / f"{name}.jsonl").is_file():
            return read_split(checkpoint, name)
        if name == "test" and (checkpoint / "splits" / "validation.jsonl").is_file():
            return read_split(checkpoint, "validation")
        option = "--data" if split == "test" else "--calibration"
        raise DataError(
            f"{checkpoint}: holds no {name} rows (it was not trained by deploykit)",
            f"give a file of rows with {option}",
        )
    return labelled_rows(source, reference.task, encoding=options.encoding, split=split).examples


def _digest(checkpoint: Path, options: ExportOptions) -> str:
    values = dataclasses.asdict(options)
    for name in ("calibration", "data"):
        path = Path(values[name] or "")
        if values[name] and path.exists():
            values[name] = artifacts.digest_path(path)
    engines = [name for name, info in ENGINES.items() if info.installed]
    return artifacts.digest_of("export", _parent(checkpoint), values, engines)


def _parent(checkpoint: Path) -> str:
    if (checkpoint / artifacts.MANIFEST).exists():
        return artifacts.load_manifest(checkpoint, "checkpoint", verify=False).digest
    return artifacts.digest_path(checkpoint)
