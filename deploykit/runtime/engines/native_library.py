"""The shared library of the engine ``native``: where it is, and whether it runs here."""

from __future__ import annotations

import ctypes
import importlib.machinery
import platform
import sys
from functools import cache
from pathlib import Path

_FLAGS = ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni")


@cache
def lacks() -> str | None:
    """What the engine needs and this machine does not have, if anything."""
    if platform.machine() != "x86_64" or sys.platform != "linux":
        return "no x86-64 Linux"
    if (file := library_file()) is None:
        return "not built: pip install -v deploykit shows the compiler's error"
    flags = Path("/proc/cpuinfo").read_text(encoding="utf-8").partition("flags")[2].partition("\n")[0].split()
    if missing := [flag for flag in _FLAGS if flag not in flags]:
        return f"no {missing[-1]} in this CPU"
    try:
        ctypes.CDLL(str(file))
    except OSError as error:
        return str(error)
    return None


def library_file() -> Path | None:
    """The library that the installation built, if it did."""
    files = (Path(__file__).with_name(f"_native{suffix}") for suffix in importlib.machinery.EXTENSION_SUFFIXES)
    return next((file for file in files if file.is_file()), None)


def open_library() -> ctypes.CDLL:
    """The library, for a caller who declares the functions that it calls; ``deploykit_free`` is declared."""
    library = ctypes.CDLL(str(library_file()))
    library.deploykit_free.argtypes = (ctypes.c_void_p,)
    library.deploykit_free.restype = None
    return library
