"""Measure the accuracy lost to INT8 by each calibration method, for a classifier and a translator.

All methods use one calibration of each model. Every export is measured on the run's test rows, without a limit on the
loss, and TensorRT-RTX builds its engines if installed. Writes bench/results/<date>-methods.json.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from suite import begin, say, write_record

from deploykit.hardware import available_cpus
from deploykit.quantization.calibration import METHODS

ROOT = Path(__file__).parents[1]
_SUBJECTS = {"sentiment": "demo/runs/sentiment", "en-fr": "demo/runs/en-fr"}
_TARGETS = ("sm_86", "portable")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="*", type=Path, help="Checkpoints (default: those of both demos that are there).")
    parser.add_argument("--calibration-rows", type=int, default=1000)
    parser.add_argument("--measure-rows", type=int, default=0, help="As deploykit export has it.")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--targets", nargs="*", default=list(_TARGETS), help="GPUs of the engines to build.")
    parser.add_argument("--data", help="Rows, of a run that kept none.")
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results" / f"{datetime.date.today()}-methods.json")
    options = parser.parse_args()
    runs = options.runs or [ROOT / path for path in _SUBJECTS.values()]
    skipped = {str(run): "no such run" for run in runs if not run.is_dir()}
    if options.targets and find_spec("tensorrt_rtx") is None:
        skipped["TensorRT-RTX"], options.targets = "not installed", []
    for name, why in skipped.items():
        say(f"skipped: {name}: {why}")
    result = begin("methods.py", available_cpus(), skipped, ())
    for run in runs:
        if run.is_dir():
            with tempfile.TemporaryDirectory(prefix="methods-") as folder:
                result["workloads"].append({"key": run.name, **measure(run, Path(folder), options)})
    write_record(result, options.out)


def measure(run: Path, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Return the calibration of a run, and the table rows of its exports."""
    given = ["--calibration-data", options.data] if options.data else []
    calibration = _deploykit(
        "calibrate", run, "--output-dir", folder / "calibration", "--calibration-rows", options.calibration_rows, *given
    )
    kept = {name: calibration[name] for name in ("rows", "rows_digest", "seconds", "peak_memory_mb")}
    record: dict[str, Any] = {"calibration": {**kept, "tensors": len(calibration["ranges"])}, "lines": []}
    for method in options.methods:
        # Only the first method's export has all targets: the build does not depend on the scales.
        for target in options.targets[: None if method == options.methods[0] else 1] or [None]:
            words = ["export", run, "--output-dir", folder / "export", "--force", "--int8", "--method", method, "--max-drop", 100,
                     "--calib", folder / "calibration", "--measure-rows", options.measure_rows]  # fmt: skip
            words += ["--data", options.data] if options.data else []
            words += ["--trt", "--builder", "rtx", "--gpu", target] if target else []
            exported = _deploykit(*words)
            record["rows"] = exported["rows"]
            for line in lines_of(exported, method, target):
                if line not in record["lines"]:
                    record["lines"].append(line)
    return record


def lines_of(exported: Mapping[str, Any], method: str, target: str | None) -> Iterator[dict[str, Any]]:
    """Return the export's accuracy table, its INT8 rows marked with ``method``, those for TensorRT with the logs'
    counts.
    """
    for line in exported["accuracy"]:
        kind = line["precision"].removeprefix("trt ")
        found = {**line, "method": method if kind == "int8" else None, "target": None, "int8_gemms": None}
        if kind != line["precision"]:
            engines = [engine for engine in exported["engines"] if engine["precision"] == kind]
            found.update(target=target, int8_gemms=sum(engine["int8_gemms"] for engine in engines))
        yield found


def _deploykit(*words: object) -> dict[str, Any]:
    command: Sequence[str] = [sys.executable, "-m", "deploykit", *map(str, words), "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    record: dict[str, Any] = json.loads(done.stdout)
    return record


if __name__ == "__main__":
    main()
