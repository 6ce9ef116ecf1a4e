"""Choose engine, precision and graph files of an export or a packaged model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from deploykit.artifacts import Manifest
from deploykit.errors import ArtifactError, UsageError
from deploykit.runtime.engines import ENGINES, EngineInfo, check_engine, check_name, installed_engines
from deploykit.runtime.engines.tensorrt import record_path, runs_here
from deploykit.runtime.tuned_settings import read_tuned
from deploykit.tasks.protocol import GraphKind

if TYPE_CHECKING:
    from deploykit.runtime.engines.protocol import Precision

_BEST_FIRST: tuple[Precision, ...] = ("int8", "fp16", "bf16", "fp32", "int4")


@dataclass(frozen=True)
class Graphs:
    """The graphs to run: the engine, the precision, and the files."""

    engine: str
    precision: Precision
    files: tuple[str, ...]


def find_graphs(path: Path, manifest: Manifest, *, engine: str, precision: str, to_run: bool = True) -> Graphs:
    """Choose engine, precision and graph files from an export or a packaged model.

    A packaged model names its engine and holds one precision. For an export, ``auto`` means the choice of ``deploykit
    tune`` on this machine, if there is one; otherwise the best engine that runs here and has graphs in the export, and
    INT8 if there is an INT8 graph. An explicit engine need not be able to run here unless ``to_run``.

    Raises UsageError for an unknown engine or precision, ArtifactError if there is no such graph.
    """
    if engine == "auto":
        engine = str(manifest.options.get("engine", "auto"))
    tuned = read_tuned(path, manifest) if engine == "auto" else None
    if tuned is not None and precision in ("auto", tuned.precision):
        engine, precision = tuned.engine, tuned.precision
    wanted = [p for p in _BEST_FIRST if precision in ("auto", p)]
    if not wanted:
        raise UsageError(f"unknown precision {precision!r}", f"choose one of: auto, {', '.join(sorted(_BEST_FIRST))}")
    kind = manifest.task.graph_kind
    if engine != "auto":
        check_name(engine)
        names = [engine]
    else:
        names = installed_engines() if kind == "encoder" else _engines_for(kind, installed_only=True)
    if kind != "encoder" and not _runs_kind(ENGINES[names[0]], kind):
        what = "translation" if kind == "encoder-decoder" else "language models"
        raise UsageError(f"the engine {engine} does not run {what}", f"give --engine {' or '.join(_engines_for(kind))}")
    for name in names:
        if to_run:
            check_engine(name)
        files = _files(manifest, name)
        for candidate in wanted:
            if candidate not in files or not set(files[candidate]) <= set(manifest.files):
                continue
            if engine == "auto" and not all(runs_here(path / file) for file in files[candidate] if _built(file)):
                continue
            return Graphs(name, candidate, files[candidate])
    remedy = "export with --int8" if precision == "int8" else "choose another --engine or --precision"
    if ENGINES[names[-1]].gpu:
        remedy = "export with --trt" + ("" if precision == "auto" else f" --precision {precision}")
    raise ArtifactError(f"{path}: has no {precision} graph for the engine {names[-1]}", remedy)


def _engines_for(kind: GraphKind, *, installed_only: bool = False) -> list[str]:
    """Return the engines that run graphs of this kind, best first. The last one is included even if it is not
    installed."""
    names = [name for name, info in ENGINES.items() if _runs_kind(info, kind)]
    return [name for name in names if not installed_only or ENGINES[name].installed or name == names[-1]]


def _runs_kind(info: EngineInfo, kind: GraphKind) -> bool:
    return bool(info.decoder if kind == "encoder-decoder" else info.language_models)


def _files(manifest: Manifest, engine: str) -> Mapping[Precision, tuple[str, ...]]:
    """Return the files that ``engine`` needs, by precision. The graph, or encoder and decoder, come first."""
    info = ENGINES[engine]
    if info.built:
        built: dict[Precision, list[str]] = {}
        for record in manifest.metrics.get("engines", ()):
            built.setdefault(record["precision"], []).append(record["file"])
        return {p: (*files, *(record_path(Path(file)).name for file in files)) for p, files in built.items()}
    if manifest.task.graph_kind == "encoder-decoder":
        return info.translators
    if manifest.task.graph_kind == "decoder":
        return info.language_models
    # A graph of more than 2 GB has its weights in a file beside it.
    return {p: (graph, *({f"{graph}_data"} & set(manifest.files))) for p, graph in info.graphs.items()}


def _built(file: str) -> bool:
    return file.endswith(".engine")
