"""Cache built engines in the user's cache directory, by a digest of all inputs.

Building takes minutes, and would give the same or an equally good engine for the same graph, options, builder and GPU.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from deploykit.artifacts import hash_file, new_directory
from deploykit.errors import DeploykitError
from deploykit.runtime.engines.tensorrt import EngineRecord, read_record, record_path


def folder() -> Path:
    """Return the cache directory. Its files may be deleted at any time."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "deploykit" / "engines"


def take(key: str, engine: Path) -> EngineRecord | None:
    """Copy the entry ``key`` (engine, record, log) to ``engine``. Returns None if there is no complete entry."""
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
    """Store an engine, its record and its log. Raises ArtifactError if the cache cannot be written."""
    with new_directory(folder() / key, shared=True) as directory:
        for source, target in zip(_files(engine), _files(directory / "engine")):
            shutil.copyfile(source, target)


def _files(engine: Path) -> tuple[Path, Path, Path]:
    return engine, record_path(engine), engine.with_suffix(".log")
