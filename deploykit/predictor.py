"""What can answer: a checkpoint, an export, a packaged model, or a model on a running server.

``evaluate``, ``predict``, ``translate`` and ``bench`` all take one of these, and treat them alike.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from deploykit.artifacts import Manifest, load_manifest
from deploykit.errors import ArtifactError, UsageError
from deploykit.runtime.classifier import Classifier, load_classifier
from deploykit.runtime.engines import (
    ENGINES,
    Precision,
    available_cpus,
    check_engine,
    check_name,
    installed_engines,
    load_engine,
)
from deploykit.runtime.engines.tensorrt import record_path, runs_here
from deploykit.runtime.translated import LongInput, Translated
from deploykit.tasks import Classification, Generation, Translation
from deploykit.tuned import read_tuned

if TYPE_CHECKING:
    from typing_extensions import TypeIs

    from deploykit.runtime.translator import Translator


class TextClassifier(Protocol):
    """Texts in, probabilities out."""

    task: Classification

    def scores(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Probabilities, float32 [texts, labels]."""

    def close(self) -> None:
        """Release connections."""


class TextTranslator(Protocol):
    """Texts in, texts out."""

    task: Translation

    def translate(
        self,
        texts: Sequence[str],
        generation: Generation | None = None,
        *,
        long_input: LongInput = "split",
        scored: bool = True,
    ) -> list[Translated]:
        """One for each text, in their order; ``generation`` in place of the task's own.

        Without ``scored`` scores may be 0, and come at no cost. Raises DataError or RequestError for a
        text that is too long, when ``long_input`` is "refuse".
        """

    def close(self) -> None:
        """Release connections."""


Predictor = TextClassifier | TextTranslator
_BEST_FIRST: tuple[Precision, ...] = ("int8", "fp16", "bf16", "fp32")


@dataclass(frozen=True)
class Graphs:
    """What of an export is run: an engine, a precision, and the files of its graphs."""

    engine: str
    precision: Precision
    files: tuple[str, ...]


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
        from deploykit.triton.client import open_served

        return open_served(target, url)
    if path.is_dir() and not (path / "manifest.json").exists() and (path / "config.json").exists():
        return _open_checkpoint(path)
    manifest = load_manifest(path)
    if manifest.kind == "checkpoint":
        return _open_checkpoint(path)
    return open_graph(path, manifest, engine=engine, precision=precision, threads=threads)


def open_classifier(target: str, **where: Any) -> TextClassifier:
    """``open_predictor``, for a command that classifies. Raises UsageError when ``target`` translates."""
    predictor = open_predictor(target, **where)
    if is_translator(predictor):
        predictor.close()
        raise UsageError(f"{target} translates, it does not classify", "use deploykit translate")
    return predictor


def open_translator(target: str, **where: Any) -> TextTranslator:
    """``open_predictor``, for a command that translates. Raises UsageError when ``target`` classifies."""
    predictor = open_predictor(target, **where)
    if not is_translator(predictor):
        predictor.close()
        raise UsageError(f"{target} classifies, it does not translate", "use deploykit predict")
    return predictor


def is_translator(predictor: Predictor) -> TypeIs[TextTranslator]:
    return isinstance(predictor.task, Translation)


def translates(checkpoint: Path) -> bool:
    """Whether a Hugging Face checkpoint is a translator's. A LoRA adapter, which has no config, is a classifier's."""
    config = checkpoint / "config.json"
    return config.is_file() and bool(json.loads(config.read_text(encoding="utf-8")).get("is_encoder_decoder"))


def open_graph(
    path: Path, manifest: Manifest, *, engine: str = "auto", precision: str = "auto", threads: int | None = None
) -> Classifier | Translator:
    """Open an export or a packaged model version in this process."""
    graphs = find_graphs(path, manifest, engine=engine, precision=precision)
    task = manifest.task
    if isinstance(task, Translation):
        from deploykit.runtime.translator import load_translator

        return load_translator(path, task, graphs.files, threads or available_cpus(), engine=graphs.engine)
    return load_classifier(path, task, load_engine(graphs.engine, path / graphs.files[0], threads))


def find_graphs(path: Path, manifest: Manifest, *, engine: str, precision: str, to_run: bool = True) -> Graphs:
    """Choose engine, precision and graph files from what a directory holds.

    A packaged model names its engine and holds one precision. Otherwise ``auto`` means what ``deploykit tune`` found
    best here, or else the best engine that can run here what the directory holds for it, and INT8 where there are graphs
    for it. An engine that is named need not be able to run here unless ``to_run``.
    """
    if engine == "auto":
        engine = str(manifest.options.get("engine", "auto"))
    tuned = read_tuned(path, manifest) if engine == "auto" else None
    if tuned is not None and precision in ("auto", tuned.precision):
        engine, precision = tuned.engine, tuned.precision
    wanted = [p for p in _BEST_FIRST if precision in ("auto", p)]
    if not wanted:
        raise UsageError(f"unknown precision {precision!r}", f"choose one of: auto, {', '.join(sorted(_BEST_FIRST))}")
    translates = isinstance(manifest.task, Translation)
    if engine != "auto":
        check_name(engine)
        names = [engine]
    else:
        names = _decoding(installed_only=True) if translates else installed_engines()
    if translates and not ENGINES[names[0]].decoder:
        decoding = " or ".join(_decoding())
        raise UsageError(f"the engine {engine} does not run translation", f"give --engine {decoding}")
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


def _decoding(*, installed_only: bool = False) -> list[str]:
    """Engines that run translators, best first; the last one even if it is not installed."""
    names = [name for name, info in ENGINES.items() if info.decoder]
    return [name for name in names if not installed_only or ENGINES[name].installed or name == names[-1]]


def _files(manifest: Manifest, engine: str) -> Mapping[Precision, tuple[str, ...]]:
    """What ``engine`` needs for each precision; the graph, or those of the encoder and the decoder, come first."""
    info = ENGINES[engine]
    if info.built:
        built: dict[Precision, list[str]] = {}
        for record in manifest.metrics.get("engines", ()):
            built.setdefault(record["precision"], []).append(record["file"])
        return {p: (*files, *(record_path(Path(file)).name for file in files)) for p, files in built.items()}
    if isinstance(manifest.task, Translation):
        return info.translators
    return {precision: (graph,) for precision, graph in info.graphs.items()}


def _built(file: str) -> bool:
    return file.endswith(".engine")


def _open_checkpoint(path: Path) -> Predictor:
    if translates(path):
        from deploykit.finetune.translator import TorchTranslator

        return TorchTranslator.load(path)
    from deploykit.finetune.checkpoint import TorchClassifier

    return TorchClassifier.load(path)
