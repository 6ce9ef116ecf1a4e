"""Open a model: a checkpoint, an export, a packaged model, or a model on a running server."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from deploykit.artifacts import MANIFEST, Manifest, digest_path, load_manifest
from deploykit.errors import ArtifactError, UsageError
from deploykit.runtime.find_graphs import find_graphs
from deploykit.runtime.served import DEFAULT_URL, ServedModel
from deploykit.tasks.protocol import Predictor
from deploykit.tasks.registry import get_task, task_of, task_of_checkpoint
from deploykit.tasks.types import Drafting

if TYPE_CHECKING:
    from deploykit.tasks.classification.predictor import TextClassifier
    from deploykit.tasks.text_generation.generator import TextGenerator
    from deploykit.tasks.translation.predictor import TextTranslator


def open_predictor(
    target: str,
    *,
    url: str,
    engine: str = "auto",
    precision: str = "auto",
    threads: int | None = None,
    draft_model: str | None = None,
) -> Predictor:
    """Open the directory or GGUF file ``target``, or the model of that name on the server at ``url``.

    ``draft_model``: the export of a smaller language model, which guesses the tokens of the export ``target``.
    """
    path = Path(target)
    if draft_model is not None:
        return _open_drafted(path, Path(draft_model), engine=engine, precision=precision, threads=threads)
    if not path.exists():
        if "/" in target:
            raise ArtifactError(
                f"{target}: no such directory", "check the path; a served model is named without slashes"
            )
        return open_served(target, url)
    if path.suffix == ".gguf" and path.is_file():
        return task_of_checkpoint(path).open_checkpoint(path)
    if path.is_dir() and not (path / "manifest.json").exists() and (path / "config.json").exists():
        return task_of_checkpoint(path).open_checkpoint(path)
    manifest = load_manifest(path)
    if manifest.kind == "checkpoint":
        return task_of(manifest.task).open_checkpoint(path)
    return open_graph(path, manifest, engine=engine, precision=precision, threads=threads)


def identity_of(target: str, predictor: Predictor) -> str:
    """Return a value that changes when ``target`` becomes another model: the digest of its files, or the server's
    answer."""
    path = Path(target)
    if isinstance(predictor, ServedModel):
        return predictor.identity()
    return load_manifest(path, verify=False).digest if (path / MANIFEST).exists() else digest_path(path)


def open_for(task: str, target: str, **where: Any) -> Predictor:
    """Open ``target`` as ``open_predictor`` does. Raises UsageError if it is for another task."""
    predictor = open_predictor(target, **where)
    found, wanted = task_of(predictor.task), get_task(task)
    if found.name != wanted.name:
        predictor.close()
        raise UsageError(f"{target} {found.does}, it does not {wanted.verb}", "use deploykit predict")
    return predictor


def open_classifier(target: str, **where: Any) -> TextClassifier:
    return cast("TextClassifier", open_for("classification", target, **where))


def open_translator(target: str, **where: Any) -> TextTranslator:
    return cast("TextTranslator", open_for("translation", target, **where))


def open_generator(target: str, **where: Any) -> TextGenerator:
    return cast("TextGenerator", open_for("text-generation", target, **where))


def open_graph(
    path: Path, manifest: Manifest, *, engine: str = "auto", precision: str = "auto", threads: int | None = None
) -> Predictor:
    """Open an export or a packaged model version in this process."""
    graphs = find_graphs(path, manifest, engine=engine, precision=precision)
    return task_of(manifest.task).open_graphs(path, manifest.task, graphs, threads)


def _open_drafted(path: Path, draft: Path, *, engine: str, precision: str, threads: int | None) -> Predictor:
    if not (path / MANIFEST).exists() or (manifest := load_manifest(path)).kind == "checkpoint":
        raise UsageError(
            f"a draft model guesses for an export, and {path} is none",
            "give an export; of a served model, give --draft-model to deploykit package",
        )
    task = task_of(manifest.task)
    if not isinstance(task, Drafting):
        raise UsageError(f"a draft model is for language models, and {path} is none", "leave --draft-model out")
    graphs = find_graphs(path, manifest, engine=engine, precision=precision)
    return task.open_drafted(path, manifest.task, graphs, threads, draft)


def open_served(name: str, url: str = DEFAULT_URL) -> Predictor:
    """Connect to the model ``name`` on the server at ``url``, as the task in its config."""
    served = ServedModel(name, url)
    served.close()
    return task_of(served.facts).open_served(name, url)
