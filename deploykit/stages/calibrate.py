"""Calibrate: collect histograms of the activations in a checkpoint's or export's fp32 graph.

One calibration serves every method, engine and export of the checkpoint.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from deploykit import artifacts
from deploykit.graphs.export_options import CalibrationOptions, Say
from deploykit.quantization.calibration import METHODS, Calibration, calibrate_named
from deploykit.stages.export import identity, parent_digest
from deploykit.tasks.registry import task_of, task_of_checkpoint
from deploykit.training.source import check_source


@dataclass(frozen=True)
class Calibrated:
    """The calibration at ``path``; ``reused`` if it already existed, made from the same inputs."""

    path: Path
    manifest: artifacts.Manifest
    reused: bool


def calibrate(source: Path, out: Path, options: CalibrationOptions, *, force: bool = False, say: Say) -> Calibrated:
    """Run rows through the fp32 graph of ``source`` and write the histograms of its activations to ``out``.

    The manifest's parent is the graph's checkpoint. Its metrics are rows, rows_digest, seconds, peak_memory_mb and
    ranges: for each tensor, the range (low, high) that each method chooses.
    """
    options.check()
    exported = _export_at(source)
    if exported is None:
        check_source(str(source))
    task_here = task_of_checkpoint(source) if exported is None else task_of(exported.task)
    options.check_task(task_here, source)
    parent = parent_digest(source) if exported is None else exported.parent
    inputs = artifacts.digest_of("calibration", parent, identity(options))
    if (manifest := artifacts.existing(out, "calibration", inputs, force=force)) is not None:
        return Calibrated(out, manifest, reused=True)
    module = task_here.export_steps()
    with artifacts.new_directory(out) as directory:
        with tempfile.TemporaryDirectory(dir=directory) as temporary:
            if exported is None:
                say("writing the fp32 graph")
                folder, task = Path(temporary), module.write_fp32(source, Path(temporary), options)
            else:
                folder, task = source, exported.task
            texts = module.calibration_texts(source, task, options)
            say(f"calibrating on {len(texts):,} rows")
            calibration: Calibration = calibrate_named(partial(module.calibrate, folder, task), texts)
        calibration.save(directory)
        by_method = {method: calibration.ranges(method) for method in METHODS}
        ranges = {name: {m: by_method[m][name] for m in METHODS} for name in calibration.histograms}
        manifest = artifacts.write_manifest(
            directory,
            "calibration",
            task,
            inputs=inputs,
            parent=parent,
            options=asdict(options),
            metrics={**calibration.to_json(), "ranges": ranges},
        )
    return Calibrated(out, manifest, reused=False)


def _export_at(path: Path) -> artifacts.Manifest | None:
    """Return the verified manifest of an export; None for anything else."""
    try:
        kind = json.loads((path / artifacts.MANIFEST).read_text(encoding="utf-8")).get("kind")
    except (OSError, ValueError, AttributeError):
        return None  # the next reader reports the error
    return artifacts.load_manifest(path, "export") if kind == "export" else None
