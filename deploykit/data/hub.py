"""Tell at once that the Hugging Face hub cannot be reached. Its client retries for half a minute before it says so."""

from __future__ import annotations

import os
from pathlib import Path

from deploykit.errors import first_line


def connection_fault(name: str, kind: str = "model") -> str | None:
    """Return why the hub cannot be asked for ``name``, a "model" or a "dataset".

    Return None if the hub answers, if a cache has files of ``name``, and in offline mode, which the client itself reports at once.
    """
    from huggingface_hub import constants, get_session

    datasets = Path(os.environ.get("HF_DATASETS_CACHE") or Path(constants.HF_HOME) / "datasets")
    caches = [Path(constants.HF_HUB_CACHE) / f"{kind}s--{name.replace('/', '--')}" / "snapshots"]
    caches += [datasets / name.replace("/", "___")] if kind == "dataset" else []
    if constants.HF_HUB_OFFLINE or any(cache.is_dir() for cache in caches):
        return None
    try:
        get_session().head(constants.ENDPOINT, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except Exception as error:  # the client's HTTP library, and so the exception, differs between its versions
        return f"{constants.ENDPOINT} does not answer ({first_line(error)})"
    return None
