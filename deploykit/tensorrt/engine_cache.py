"""Engines built before, in the user's cache, each under the digest of what determines it.

Builders take minutes and, but for TensorRT-RTX, measure kernels: the same graph, options, builder and GPU would give the
same engine, or one as good.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from deploykit.artifacts import hash_file, new_directory
from deploykit.errors import DeploykitError
from deploykit.runtime.engines.tensorrt import EngineRecord, read_record, record_path


def folder() -> Path:
    """Where they are. Any of it may be deleted at any time."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "deploykit" / "engines"


def take(key: str, engine: Path) -> EngineRecord | None:
    """Copy what is kept under ``key`` to ``engine`` and beside it; None where nothing whole is."""
    kept = folder() / key / "engine"
    try:
        record = read_record(kept)
        if hash_file(kept) != record.sha256:
            return None
        for source, target in zip(_files(kept), _files(engine)):
            shutil.copyfile(source, target)
    except (DeploykitError, OSError):
        return None
    return record


def keep(key: str, engine: Path) -> None:
    """Keep an engine, its record and its log. Raises ArtifactError where the cache cannot be written."""
    with new_directory(folder() / key) as directory:
        for source, target in zip(_files(engine), _files(directory / "engine")):
            shutil.copyfile(source, target)


def _files(engine: Path) -> tuple[Path, Path, Path]:
    return engine, record_path(engine), engine.with_suffix(".log")
