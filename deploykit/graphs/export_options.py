"""Define the options of an export, and what the stage shares with each task's own steps."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from deploykit import artifacts
from deploykit.data.sample import evenly
from deploykit.errors import DataError, UsageError
from deploykit.quantization.calibration import METHODS, Method, is_saved
from deploykit.tasks.protocol import TaskFacts
from deploykit.tensorrt.build import EngineOptions
from deploykit.training.rows import read_split

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
    ``max_drop`` is in points (of 100) of macro-F1, or of BLEU and of chrF, or in percent of a language model's perplexity.
    ``int4`` is for language models. ``smooth_quant`` is SmoothQuant's alpha (None:
    without). ``trt``: also build TensorRT engines."""

    int8: bool = False
    int4: bool = False
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
class Written:
    """What a task's own part of the export found: ``metrics`` has parity, rows, accuracy_table and, for
    INT8, quantization."""

    task: TaskFacts
    metrics: dict[str, Any]


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
