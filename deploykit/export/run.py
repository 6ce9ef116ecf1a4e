"""Export: checkpoint in; ONNX, optionally INT8, checked and measured, out. The same steps for every task."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from deploykit import artifacts
from deploykit.errors import DataError, UsageError
from deploykit.export.calibration import METHODS, Method
from deploykit.export.tensorrt import EngineOptions
from deploykit.finetune.checkpoint import check_source
from deploykit.finetune.rows import read_split
from deploykit.predictor import translates
from deploykit.runtime.engines import ENGINES
from deploykit.tasks import Task

Say = Callable[[str], None]
Row = TypeVar("Row")

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class ExportOptions:
    """``calibration`` is the name of one of the run's splits or a data file; ``data`` a file of rows to
    measure on (default: the run's test rows), of which ``measure_rows`` are used (0: all, or 500 to translate).
    ``max_drop`` is in points (of 100) of macro-F1, or of BLEU and of chrF. ``source`` and ``target``
    are the languages of a translation checkpoint that was trained elsewhere. ``smooth_quant`` is SmoothQuant's alpha (None:
    without). ``trt``: also build TensorRT engines."""

    int8: bool = False
    calibration: str = "train"
    calibration_rows: int = 512
    method: Method = "minmax"
    max_drop: float = 0.5
    data: str | None = None
    measure_rows: int = 0
    encoding: str | None = None
    source: str | None = None
    target: str | None = None
    smooth_quant: float | None = None
    trt: EngineOptions | None = None

    def check(self) -> None:
        if self.method not in METHODS:
            raise UsageError(f"unknown --method {self.method!r}", f"choose one of: {', '.join(METHODS)}")
        if self.calibration_rows < 1:
            raise UsageError(f"--calibration-rows is {self.calibration_rows}", "give 1 or more")
        if self.measure_rows < 0:
            raise UsageError(f"--measure-rows is {self.measure_rows}", "give 0 for all, or more")
        if not 0 <= self.max_drop <= 100:
            raise UsageError(f"--max-drop is {self.max_drop}", "give points from 0 to 100")
        if self.smooth_quant is not None:
            if not self.int8:
                raise UsageError("--smooth-quant changes INT8 graphs alone", "add --int8")
            if not 0 <= self.smooth_quant <= 1:
                raise UsageError(f"--smooth-quant is {self.smooth_quant}", "give an alpha from 0 to 1")
        if self.trt is not None:
            self.trt.check()


@dataclass(frozen=True)
class Exported:
    out: Path
    manifest: artifacts.Manifest
    reused: bool


@dataclass(frozen=True)
class Written:
    """What a task's own part of the export found: ``metrics`` has parity, rows, accuracy_table and, for
    INT8, quantization."""

    task: Task
    metrics: dict[str, Any]


def export(checkpoint: Path, out: Path, options: ExportOptions, *, force: bool = False, say: Say) -> Exported:
    """Write fp32 ONNX and, with ``int8``, quantized graphs for each target, each measured on the same rows.

    Raises ExportError, leaving nothing at ``out``, when a graph differs from PyTorch, when an
    engine runs no INT8 kernel, or when INT8 costs more than ``max_drop`` points.
    """
    options.check()
    check_source(str(checkpoint))
    inputs = _digest(checkpoint, options)
    if (manifest := artifacts.existing(out, "export", inputs, force=force)) is not None:
        return Exported(out, manifest, reused=True)
    if translates(checkpoint):
        if options.smooth_quant is not None:
            raise UsageError("--smooth-quant is for classifiers, and this checkpoint translates", "leave it out")
        from deploykit.export.translation import write
    else:
        from deploykit.export.classification import write
    if options.trt is not None:
        command = command_of(checkpoint, out, options)
        options = dataclasses.replace(options, trt=dataclasses.replace(options.trt, command=command))
    with artifacts.new_directory(out) as directory:
        written = write(checkpoint, directory, options, say)
        manifest = artifacts.write_manifest(
            directory,
            "export",
            written.task,
            inputs=inputs,
            parent=_parent(checkpoint),
            options=dataclasses.asdict(options),
            metrics=written.metrics,
        )
    return Exported(out, manifest, reused=False)


def command_of(checkpoint: Path, out: Path, options: ExportOptions) -> str:
    """What to type for this export; builder and target of its engines are left out."""
    words = ["deploykit", "export", str(checkpoint), "--out", str(out)]
    settings = [(field, getattr(options, field.name)) for field in dataclasses.fields(options) if field.name != "trt"]
    if options.trt is not None:
        words += ["--trt", *(word for precision in options.trt.precisions for word in ("--precision", precision))]
        words += [word for profile in options.trt.profiles for word in ("--profile", profile)]
        kept = ("workspace", "timing_cache")
        settings += [(f, getattr(options.trt, f.name)) for f in dataclasses.fields(options.trt) if f.name in kept]
    for field, value in settings:
        if value != field.default:
            option = f"--{field.name.replace('_', '-')}"
            words += [option] if value is True else [option, str(value)]
    return shlex.join(words)


def pick_rows(
    checkpoint: Path,
    source: str | None,
    split: str,
    kind: type[Row],
    read_file: Callable[[str, str], list[Row]],
) -> list[Row]:
    """Rows of a file (``read_file(path, split)``), or of the run's own splits where ``source`` names one or nothing."""
    if source is not None and (Path(source).exists() or source not in SPLITS):
        return read_file(source, split)
    name = source or split
    for kept in (name, "validation") if name == "test" else (name,):
        if (checkpoint / "splits" / f"{kept}.jsonl").is_file():
            return read_split(checkpoint, kept, kind)
    option = "--data" if split == "test" else "--calibration"
    raise DataError(
        f"{checkpoint}: holds no {name} rows (it was not trained by deploykit)", f"give a file of rows with {option}"
    )


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
