"""A model repository with a small random model of each task."""

from __future__ import annotations

from pathlib import Path

from language_models import write_export
from tiny_answerer import write_export as write_answerer_export

from deploykit.runtime.serving_settings import ServingSettings
from deploykit.triton.repository import package


def package_each_task(folder: Path, classifier: Path, translator: Path, *, template: str) -> Path:
    """Package exports of the two, and new ones of an answerer and of a language model with a chat ``template``, as tiny, fr, qa
    and lm. Returns the repository, in ``folder``."""
    repository = folder / "repository"
    package(classifier, "tiny", repository, engine="onnxruntime", precision="fp32")
    package(translator, "fr", repository, settings=ServingSettings(threads=1))
    package(write_answerer_export(folder / "qa"), "qa", repository, engine="onnxruntime", precision="fp32")
    lm = write_export(folder / "lm", template=template, max_position_embeddings=256)
    package(lm, "lm", repository, settings=ServingSettings(threads=1, max_rows=8))
    return repository
