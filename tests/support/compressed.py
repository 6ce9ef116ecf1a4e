"""Compress the bytes of a file as the suffix of its name says."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import lzma
import zipfile
from collections.abc import Callable

COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}
with contextlib.suppress(ImportError):  # the extra zst
    import zstandard

    COMPRESS[".zst"] = zstandard.compress
COMPRESSIONS = (*COMPRESS, ".zip")


def compressed(content: bytes, suffix: str, name: str) -> bytes:
    """Return the content of ``name`` + ``suffix``; a .zip has one file, ``name``."""
    if suffix != ".zip":
        return COMPRESS[suffix](content)
    whole = io.BytesIO()
    with zipfile.ZipFile(whole, "w") as archive:
        archive.writestr(name, content)
    return whole.getvalue()
