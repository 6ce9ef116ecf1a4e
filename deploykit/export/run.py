"""Export: checkpoint in; ONNX, optionally INT8, checked and measured, out. The same steps for every task."""

from __future__ import annotations

import dataclasses
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploykit import artifacts
from deploykit.errors import MissingDependencyError, UsageError
from deploykit.graphs.export_options import CalibrationOptions, ExportOptions, Say, Written
from deploykit.measurement_log import Trace
from deploykit.quantization.calibration import is_saved, load_calibration
from deploykit.quantization.grading import POINTS
from deploykit.quantization.tables import SEARCH_PAGE, render_searches
from deploykit.runtime.engines import ENGINES
from deploykit.tasks.registry import task_of_checkpoint
from deploykit.training.source import check_source

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class Exported:
    out: Path
    manifest: artifacts.Manifest
    reused: bool


def export(checkpoint: Path, out: Path, options: ExportOptions, *, force: bool = False, say: Say) -> Exported:
    """Write fp32 ONNX and, with ``int8``, quantized graphs for each target, each measured on the same rows.

    Raises ExportError, leaving nothing at ``out``, when a graph differs from PyTorch, when an
    engine runs no INT8 kernel, or when INT8 costs more than ``max_drop`` points. A search for layers in fp32 that is
    killed is taken up again from OUT.search.json by the next export of the same inputs.
    """
    options.check()
    check_source(str(checkpoint))
    task = task_of_checkpoint(checkpoint)
    if options.int4 and task.facts.graph_kind != "decoder":
        raise UsageError(f"--int4 is for language models, and {checkpoint} {task.does}", "use --int8")
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
        written: Written = task.export_steps().write(checkpoint, directory, options, saved, trace, say)
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
