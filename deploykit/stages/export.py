"""Export a checkpoint to ONNX, optionally INT8, checked and measured. The steps are the same for every task."""

from __future__ import annotations

import dataclasses
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploykit import artifacts
from deploykit.data.reading import flag
from deploykit.errors import MissingDependencyError, UsageError
from deploykit.graphs.export_options import CalibrationOptions, ExportOptions, Say, Written
from deploykit.measurement_log import MeasurementLog
from deploykit.metric_titles import points_of
from deploykit.quantization.calibration import load_calibration
from deploykit.quantization.tables import SEARCH_PAGE, render_searches
from deploykit.runtime.engines import ENGINES
from deploykit.tasks.registry import task_of_checkpoint
from deploykit.tensorrt.options import shapes_of_profile
from deploykit.training.source import check_source

if TYPE_CHECKING:
    pass


_TRTEXEC = {"workspace": "--memPoolSize=workspace:", "timing_cache": "--timingCacheFile="}
"""Options of engines -> their names in trtexec."""


@dataclass(frozen=True)
class Exported:
    """The export at ``path``; ``reused`` if it already existed, made from the same inputs.

    ``manifest.metrics`` has "parity" with PyTorch and "accuracy_table", a line for each engine and precision.
    """

    path: Path
    manifest: artifacts.Manifest
    reused: bool


def export(checkpoint: Path, out: Path, options: ExportOptions, *, force: bool = False, say: Say) -> Exported:
    """Write fp32 ONNX and, with ``int8``, quantized graphs for each target, each measured on the same rows.

    Raises ExportError, leaving nothing at ``out``, when a graph differs from PyTorch, when an engine runs no INT8
    kernel, or when INT8 loses more than ``max_drop`` points. After a killed search for layers in fp32, the next export
    of the same inputs continues it from OUT.search.json.
    """
    options = options.with_precisions()
    options.check()
    check_source(str(checkpoint))
    task = task_of_checkpoint(checkpoint)
    options.check_task(task, checkpoint)
    for option, given, remedy in (
        ("--int4", options.int4, "use --int8"),
        ("--gguf", options.gguf, "leave it out"),
        ("--kv-cache-dtype", options.kv_cache_dtype, "leave it out"),
    ):
        if given and task.facts.graph_kind != "decoder":
            raise UsageError(f"{option} is for language models, and {checkpoint} {task.does}", remedy)
    if options.optimum and task.facts.graph_kind != "encoder-decoder":
        raise UsageError(
            f"--optimum is for translators, and {checkpoint} {task.does}",
            "leave it out: the export has optimum's layout",
        )
    parent = parent_digest(checkpoint)
    engines = [name for name, info in ENGINES.items() if info.installed]
    inputs = artifacts.digest_of("export", parent, identity(options), engines)
    if (manifest := artifacts.existing(out, "export", inputs, force=force)) is not None:
        return Exported(out, manifest, reused=True)
    saved = load_calibration(Path(options.calib), parent) if options.calib is not None else None
    trace = MeasurementLog(
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
    """Print the result of a search for layers in fp32, if there was one, and plot it on a page of the export."""
    searches = metrics.get("quantization", {}).get("search")
    if not searches:
        return
    from deploykit.report.pages import write_search

    for line in render_searches(searches):
        say(line)
    reference = metrics["accuracy_table"][0]
    judged = next(iter(searches.values()))["trials"][0]["metrics"]
    limits = {name: (reference[name], reference[name] - max_drop / points_of(name)) for name in judged}
    try:
        write_search(searches, limits, directory / SEARCH_PAGE)
    except MissingDependencyError as error:
        say(f"the search is not plotted: {error.message}: {error.remedy}")


def command_of(checkpoint: Path, out: Path, options: ExportOptions) -> str:
    """Return the command line of this export, without builder and GPU of its engines."""
    words = ["deploykit", "export", str(checkpoint), "--output-dir", str(out)]
    settings = [(field, getattr(options, field.name)) for field in dataclasses.fields(options) if field.name != "trt"]
    if options.trt is not None:
        words += ["--trt", *(word for precision in options.trt.precisions for word in ("--precision", precision))]
        for profile in options.trt.profiles:
            words += [word for pair in shapes_of_profile(profile).items() for word in pair]
        settings += [(f, getattr(options.trt, f.name)) for f in dataclasses.fields(options.trt) if f.name in _TRTEXEC]
    for field, value in settings:
        if value != field.default:
            option = flag(field.name)
            if field.name in _TRTEXEC:
                words.append(f"{_TRTEXEC[field.name]}{value}")
            else:
                given = (
                    (",".join(value),) if field.name == "columns" else value if isinstance(value, tuple) else (value,)
                )
                words += [option] if value is True else [word for one in given for word in (option, str(one))]
    return shlex.join(words)


def identity(options: CalibrationOptions) -> dict[str, Any]:
    """Return the options, with files replaced by their digests."""
    values = dataclasses.asdict(options)
    for name in ("calibration_data", "calib", "data"):
        path = Path(values.get(name) or "")
        if values.get(name) and path.exists():
            values[name] = artifacts.digest_path(path)
    return values


def parent_digest(checkpoint: Path) -> str:
    """Return the digest of a checkpoint, whether or not deploykit wrote it."""
    if (checkpoint / artifacts.MANIFEST).exists():
        return artifacts.load_manifest(checkpoint, "checkpoint", verify=False).digest
    return artifacts.digest_path(checkpoint)
