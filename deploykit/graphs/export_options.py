"""Options of an export, and helpers for the stage and the tasks' export steps."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from deploykit import artifacts
from deploykit.data.reading import Reading, flag
from deploykit.data.sample import evenly
from deploykit.errors import DataError, UsageError
from deploykit.graphs.gguf_file import GGUF_TYPES
from deploykit.quantization.calibration import METHODS, Method
from deploykit.quantization.grading import Grader
from deploykit.runtime.engines.native.causal_weights import CACHES
from deploykit.tasks.protocol import Task, TaskFacts
from deploykit.tensorrt.options import EngineOptions
from deploykit.training.rows import read_split, row_record

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


Say = Callable[[str], None]


Row = TypeVar("Row")


DEFAULT_METHOD: Method = "minmax"


SPLITS = ("train", "validation", "test")


_SAMPLES = 64
_AT_HAND = 1000
_CALIBRATION_ROWS = 512
_OF_ROWS = ("calibration_split", "calibration_data", "calibration_rows")


@dataclass(frozen=True)
class CalibrationOptions(Reading):
    """Options for reading files of rows (``Reading``), and the rows that INT8 is calibrated on: ``calibration_rows`` (None: 512) of the
    run's own split ``calibration_split`` (None: train), or of the data file ``calibration_data``. ``source_lang`` and ``target_lang`` are the languages of a translation checkpoint that was
    trained elsewhere; ``text_column`` and ``label_column`` are a classifier's columns in files of rows, and two of
    ``text_column`` say that a checkpoint trained elsewhere reads pairs of texts."""

    calibration_split: str | None = None
    calibration_data: str | None = None
    calibration_rows: int | None = None
    source_lang: str | None = None
    target_lang: str | None = None
    text_column: tuple[str, ...] = ()
    label_column: tuple[str, ...] = ()

    @property
    def row_files(self) -> tuple[str, ...]:
        """The files of rows that the options name."""
        return (self.calibration_data,) if self.calibration_data else ()

    @property
    def calibration(self) -> str:
        """The name of the split, or the data file."""
        return self.calibration_data or self.calibration_split or "train"

    @property
    def rows_to_calibrate(self) -> int:
        """Maximum number of rows to calibrate on."""
        return _CALIBRATION_ROWS if self.calibration_rows is None else self.calibration_rows

    def check_task(self, task: Task, checkpoint: Path) -> None:
        """Raise UsageError for columns that rows of ``task`` do not have."""
        for name in ("text_column", "label_column"):
            if getattr(self, name) and name not in task.columns:
                raise UsageError(f"{flag(name)} is for classifiers, and {checkpoint} {task.does}", "leave it out")

    def check(self) -> None:
        super().check()
        if not self.row_files:
            self.refuse("the rows of a run")
        if self.calibration_split is not None and self.calibration_split not in SPLITS:
            raise UsageError(
                f"--calibration-split is {self.calibration_split!r}",
                f"choose one of: {', '.join(SPLITS)}; a file of rows is --calibration-data",
            )
        if self.calibration_data is not None and self.calibration_split is not None:
            raise UsageError("--calibration-split and --calibration-data are both given", "leave one out")
        if self.rows_to_calibrate < 1:
            raise UsageError(f"--calibration-rows is {self.calibration_rows}", "give 1 or more")


@dataclass(frozen=True)
class ExportOptions(CalibrationOptions):
    """``calib`` is the folder of a calibration that ``deploykit calibrate`` wrote. ``data`` is a file of rows to
    measure on (default: the run's test rows), of which ``measure_rows`` are used (0: all, or 500 to translate).
    ``method`` finds the ranges (None: ``DEFAULT_METHOD``). ``max_drop`` is in points (of 100) of macro-F1, or of BLEU and of chrF, or in percent of a language model's perplexity.
    ``int4``, ``gguf`` (types of weights, ``GGUF_TYPES``) and ``kv_cache_dtype`` (of keys and values in the engine ``native``;
    None: the first of ``CACHES``) are for language models. ``smooth_quant`` is SmoothQuant's
    alpha (None: without). ``trt``: also build TensorRT engines. ``optimum``: also write a translator's graphs as optimum
    lays them out."""

    int8: bool = False
    int4: bool = False
    gguf: tuple[str, ...] = ()
    kv_cache_dtype: str | None = None
    calib: str | None = None
    method: Method | None = None
    max_drop: float = 0.5
    data: str | None = None
    measure_rows: int = 0
    smooth_quant: float | None = None
    trt: EngineOptions | None = None
    optimum: bool = False

    @property
    def range_method(self) -> Method:
        """The method that finds ranges."""
        return self.method or DEFAULT_METHOD

    @property
    def kv_cache(self) -> str:
        """The type of keys and values in the engine ``native``."""
        return self.kv_cache_dtype or CACHES[0]

    @property
    def calibrates(self) -> bool:
        """Whether a calibration option is given: only then is a language model calibrated."""
        of_calibration = (*_OF_ROWS, "calib", "method", "smooth_quant")
        return any(getattr(self, name) is not None for name in of_calibration)

    @property
    def row_files(self) -> tuple[str, ...]:
        return (*super().row_files, *((self.data,) if self.data else ()))

    def with_precisions(self) -> ExportOptions:
        """Return the options with default precisions of engines, and with INT8 if an engine needs it."""
        if self.trt is None:
            return self
        precisions = self.trt.precisions or (("fp16", "int8") if self.int8 else ("fp16",))
        trt = dataclasses.replace(self.trt, precisions=precisions)
        return dataclasses.replace(self, int8=self.int8 or "int8" in precisions, trt=trt)

    def check(self) -> None:
        super().check()
        if self.range_method not in METHODS:
            raise UsageError(f"unknown --method {self.method!r}", f"choose one of: {', '.join(METHODS)}")
        for kind in self.gguf:
            if kind not in GGUF_TYPES:
                raise UsageError(f"--gguf is {kind!r}", f"choose from: {', '.join(GGUF_TYPES)}")
        if self.kv_cache_dtype is not None:
            if self.kv_cache_dtype not in CACHES:
                raise UsageError(f"--kv-cache-dtype is {self.kv_cache_dtype!r}", f"choose one of: {', '.join(CACHES)}")
            if not (self.int8 or self.int4):
                raise UsageError(
                    "--kv-cache-dtype is for the engine native, which runs INT8 and INT4", "add --int8 or --int4"
                )
        if self.measure_rows < 0:
            raise UsageError(f"--measure-rows is {self.measure_rows}", "give 0 for all, or more")
        if self.calib is not None:
            for name in _OF_ROWS:
                if getattr(self, name) is not None:
                    raise UsageError(f"{flag(name)} is for rows, and --calib has collected its own", "leave it out")
        if not 0 <= self.max_drop <= 100:
            raise UsageError(f"--max-drop is {self.max_drop}", "give points from 0 to 100")
        if self.smooth_quant is not None:
            if not self.int8:
                raise UsageError("--smooth-quant is for INT8", "add --int8")
            if not 0 <= self.smooth_quant <= 1:
                raise UsageError(f"--smooth-quant is {self.smooth_quant}", "give an alpha from 0 to 1")
            if self.calib is not None:
                raise UsageError(
                    f"--smooth-quant changes what is calibrated, and {self.calib} was collected without it",
                    "give --calibration-split or --calibration-data in place of --calib, or leave one out",
                )
        if self.trt is not None:
            self.trt.check()


@dataclass(frozen=True)
class Written:
    """Result of a task's export steps. ``metrics`` has parity, rows, accuracy_table and, for INT8, quantization."""

    task: TaskFacts
    metrics: dict[str, Any]


def graded(task: TaskFacts, metrics: dict[str, Any], grader: Grader[Any]) -> Written:
    """Add the results of ``grader`` to the metrics of an export."""
    table = [line.to_json() for line in grader.table]
    return Written(task, {**metrics, "test": grader.metrics, "accuracy_table": table})


def pick_rows(
    checkpoint: Path,
    source: str | None,
    split: str,
    kind: type[Row],
    read_file: Callable[[str, str], list[Row]],
) -> list[Row]:
    """Return the rows of a file (``read_file(path, split)``), or of a split of the run, ``split`` if ``source`` is
    None.

    Raises DataError if the checkpoint has no such split.
    """
    if source is not None and (Path(source).exists() or source not in SPLITS):
        return read_file(source, split)
    name = source or split
    for kept in (name, "validation") if name == "test" else (name,):
        if (checkpoint / "splits" / f"{kept}.jsonl").is_file():
            return read_split(checkpoint, kept, kind)
    option = "--data" if split == "test" else "--calibration-data"
    raise DataError(
        f"{checkpoint}: has no {name} rows (only checkpoints of deploykit finetune have)",
        f"give a file of rows with {option}",
    )


def rows_at_hand(checkpoint: Path, rows: Sequence[Row], kind: type[Row]) -> list[Row]:
    """Return ``rows``, and rows of the run's own splits, evenly drawn: at most 1,000 in all, or ``rows`` if they are more."""
    kept = [name for name in SPLITS if (checkpoint / "splits" / f"{name}.jsonl").is_file()]
    more = [row for name in kept for row in read_split(checkpoint, name, kind)]
    count = max(0, _AT_HAND - len(rows))
    return [*rows, *(evenly(more, count) if count else ())]


def keep_samples(directory: Path, rows: Sequence[DataclassInstance]) -> None:
    """Write some of the measured rows to the export, so that later artifacts can be compared on them."""
    samples = (json.dumps(row_record(row), ensure_ascii=False) for row in evenly(rows, _SAMPLES))
    (directory / artifacts.SAMPLES).write_text("\n".join(samples) + "\n", encoding="utf-8")
