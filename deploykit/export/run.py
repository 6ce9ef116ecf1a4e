"""Export: checkpoint in; ONNX, optionally INT8, checked and measured, out. The same steps for every task."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from deploykit import artifacts
from deploykit.data.sample import evenly
from deploykit.errors import DataError, MissingDependencyError, UsageError
from deploykit.measurement_log import Trace
from deploykit.quantization.calibration import METHODS, Method, is_saved, load_calibration
from deploykit.quantization.grading import POINTS
from deploykit.quantization.tables import SEARCH_PAGE, render_searches
from deploykit.runtime.engines import ENGINES
from deploykit.tasks.protocol import TaskFacts
from deploykit.tasks.registry import task_of_checkpoint
from deploykit.tensorrt.build import EngineOptions
from deploykit.training.rows import read_split
from deploykit.training.source import check_source

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Say = Callable[[str], None]
Row = TypeVar("Row")

SPLITS = ("train", "validation", "test")
_SAMPLES = 64


@dataclass(frozen=True)
class CalibrationOptions:
    """``calibration`` is the name of one of the run's splits or a data file, of which ``calibration_rows`` are used.
    ``source`` and ``target`` are the languages of a translation checkpoint that was trained elsewhere."""

    calibration: str = "train"
    calibration_rows: int = 512
    encoding: str | None = None
    source: str | None = None
    target: str | None = None

    def check(self) -> None:
        if self.calibration_rows < 1:
            raise UsageError(f"--calibration-rows is {self.calibration_rows}", "give 1 or more")


@dataclass(frozen=True)
class ExportOptions(CalibrationOptions):
    """``calibration`` may also be what ``deploykit calibrate`` wrote. ``data`` is a file of rows to
    measure on (default: the run's test rows), of which ``measure_rows`` are used (0: all, or 500 to translate).
    ``max_drop`` is in points (of 100) of macro-F1, or of BLEU and of chrF. ``smooth_quant`` is SmoothQuant's alpha (None:
    without). ``trt``: also build TensorRT engines."""

    int8: bool = False
    method: Method = "minmax"
    max_drop: float = 0.5
    data: str | None = None
    measure_rows: int = 0
    smooth_quant: float | None = None
    trt: EngineOptions | None = None

    def check(self) -> None:
        super().check()
        if self.method not in METHODS:
            raise UsageError(f"unknown --method {self.method!r}", f"choose one of: {', '.join(METHODS)}")
        if self.measure_rows < 0:
            raise UsageError(f"--measure-rows is {self.measure_rows}", "give 0 for all, or more")
        if is_saved(self.calibration) and self.calibration_rows != CalibrationOptions.calibration_rows:
            raise UsageError("--calibration-rows is for rows, and --calibration has collected its own", "leave it out")
        if not 0 <= self.max_drop <= 100:
            raise UsageError(f"--max-drop is {self.max_drop}", "give points from 0 to 100")
        if self.smooth_quant is not None:
            if not self.int8:
                raise UsageError("--smooth-quant changes INT8 graphs alone", "add --int8")
            if not 0 <= self.smooth_quant <= 1:
                raise UsageError(f"--smooth-quant is {self.smooth_quant}", "give an alpha from 0 to 1")
            if is_saved(self.calibration):
                raise UsageError(
                    f"--smooth-quant changes what is calibrated, and {self.calibration} was collected without it",
                    "give a split of the run or a file of rows as --calibration, or leave one out",
                )
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

    task: TaskFacts
    metrics: dict[str, Any]


def export(checkpoint: Path, out: Path, options: ExportOptions, *, force: bool = False, say: Say) -> Exported:
    """Write fp32 ONNX and, with ``int8``, quantized graphs for each target, each measured on the same rows.

    Raises ExportError, leaving nothing at ``out``, when a graph differs from PyTorch, when an
    engine runs no INT8 kernel, or when INT8 costs more than ``max_drop`` points. A search for layers in fp32 that is
    killed is taken up again from OUT.search.json by the next export of the same inputs.
    """
    options.check()
    check_source(str(checkpoint))
    parent = parent_digest(checkpoint)
    engines = [name for name, info in ENGINES.items() if info.installed]
    inputs = artifacts.digest_of("export", parent, identity(options), engines)
    if (manifest := artifacts.existing(out, "export", inputs, force=force)) is not None:
        return Exported(out, manifest, reused=True)
    saved = load_calibration(Path(options.calibration), parent) if is_saved(options.calibration) else None
    trace = Trace(
        out.with_name(f"{out.name}.search.json"), artifacts.digest_of(inputs, artifacts.installed_versions()), say
    )
    if options.trt is not None:
        command = command_of(checkpoint, out, options)
        options = dataclasses.replace(options, trt=dataclasses.replace(options.trt, command=command))
    with artifacts.new_directory(out) as directory:
        written: Written = (
            task_of_checkpoint(checkpoint).export_steps().write(checkpoint, directory, options, saved, trace, say)
        )
        _draw_search(directory, written.metrics, options.max_drop, say)
        manifest = artifacts.write_manifest(
            directory,
            "export",
            written.task,
            inputs=inputs,
            parent=parent,
            options=dataclasses.asdict(options),
            metrics=written.metrics,
        )
    trace.remove()
    return Exported(out, manifest, reused=False)


def _draw_search(directory: Path, metrics: dict[str, Any], max_drop: float, say: Say) -> None:
    """Show what a search for layers in fp32 has measured, if there was one, as a page of the export."""
    searches = metrics.get("quantization", {}).get("search")
    if not searches:
        return
    from deploykit.report.pages import write_search

    for line in render_searches(searches):
        say(line)
    reference = metrics["accuracy_table"][0]
    limits = {
        name: (reference[name], reference[name] - max_drop / POINTS[name]) for name in POINTS if name in reference
    }
    try:
        write_search(searches, limits, directory / SEARCH_PAGE)
    except MissingDependencyError as error:
        say(f"the search is not drawn: {error.message}: {error.remedy}")


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
        f"{checkpoint}: holds no {name} rows (only what deploykit finetune wrote does)",
        f"give a file of rows with {option}",
    )


def keep_samples(directory: Path, rows: Sequence[DataclassInstance]) -> None:
    """Write some of the rows that the export is measured on, for whatever is made of it to be compared on."""
    samples = (json.dumps(dataclasses.asdict(row), ensure_ascii=False) for row in evenly(rows, _SAMPLES))
    (directory / artifacts.SAMPLES).write_text("\n".join(samples) + "\n", encoding="utf-8")


def identity(options: CalibrationOptions) -> dict[str, Any]:
    """The options, with the digests of files in place of their names."""
    values = dataclasses.asdict(options)
    for name in ("calibration", "data"):
        path = Path(values.get(name) or "")
        if values.get(name) and path.exists():
            values[name] = artifacts.digest_path(path)
    return values


def parent_digest(checkpoint: Path) -> str:
    """The digest of a checkpoint, also of one that deploykit did not write."""
    if (checkpoint / artifacts.MANIFEST).exists():
        return artifacts.load_manifest(checkpoint, "checkpoint", verify=False).digest
    return artifacts.digest_path(checkpoint)
