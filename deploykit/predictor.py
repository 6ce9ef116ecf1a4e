"""What can answer: a checkpoint, an export, a packaged model, or a model on a running server.

``evaluate``, ``predict`` and ``bench`` all take one of these, and treat them alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from deploykit.artifacts import Manifest, load_manifest
from deploykit.errors import ArtifactError, UsageError
from deploykit.runtime.batching import DEFAULT_TOKEN_BUDGET
from deploykit.runtime.classifier import Classifier, load_classifier
from deploykit.runtime.engines import ENGINES, Precision, choose_engine, load_engine
from deploykit.tasks import Task


class Predictor(Protocol):
    """Texts in, probabilities out."""

    task: Task

    def scores(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Probabilities, float32 [texts, labels]."""

    def close(self) -> None:
        """Release connections."""


def open_predictor(
    target: str,
    *,
    url: str,
    engine: str = "auto",
    precision: str = "auto",
    threads: int | None = None,
) -> Predictor:
    """Open what ``target`` names: a directory of any kind, or else a model on the server at ``url``."""
    path = Path(target)
    if not path.exists():
        if "/" in target:
            raise ArtifactError(
                f"{target}: no such directory", "check the path; a served model is named without slashes"
            )
        from deploykit.triton.client import ServedClassifier

        return ServedClassifier(target, url)
    if path.is_dir() and not (path / "manifest.json").exists() and (path / "config.json").exists():
        return _open_checkpoint(path)
    manifest = load_manifest(path)
    if manifest.kind == "checkpoint":
        return _open_checkpoint(path)
    return open_graph(path, manifest, engine=engine, precision=precision, threads=threads)


def open_graph(
    path: Path,
    manifest: Manifest,
    *,
    engine: str = "auto",
    precision: str = "auto",
    threads: int | None = None,
    token_budget: int = DEFAULT_TOKEN_BUDGET,
) -> Classifier:
    """Open an export or a packaged model version in this process."""
    name, _, graph = find_graph(path, manifest, engine=engine, precision=precision)
    loaded = load_engine(name, path / graph, threads)
    return load_classifier(path, manifest.task, loaded, token_budget=token_budget)


def find_graph(path: Path, manifest: Manifest, *, engine: str, precision: str) -> tuple[str, Precision, str]:
    """Choose engine, precision and graph file from what a directory holds.

    A packaged model names its engine and holds one graph. Otherwise ``auto`` means the best
    installed engine, and INT8 where there is a graph for it.
    """
    if engine == "auto" and "engine" in manifest.options:
        engine = str(manifest.options["engine"])
    name = choose_engine(engine)
    graphs = ENGINES[name].graphs
    wanted: tuple[Precision, ...]
    if precision == "auto":
        wanted = ("int8", "fp32")
    elif precision in graphs:
        wanted = ("int8",) if precision == "int8" else ("fp32",)
    else:
        raise UsageError(f"unknown precision {precision!r}", f"choose one of: auto, {', '.join(graphs)}")
    for candidate in wanted:
        if graphs[candidate] in manifest.files:
            return name, candidate, graphs[candidate]
    raise ArtifactError(
        f"{path}: has no {precision} graph for the engine {name}",
        "export with --int8" if precision == "int8" else "choose another --engine or --precision",
    )


def _open_checkpoint(path: Path) -> Predictor:
    from deploykit.finetune.checkpoint import TorchClassifier

    return TorchClassifier.load(path)
