"""Find and load the shared library of the engine ``native``, and choose its instruction set."""

from __future__ import annotations

import ctypes
import importlib.machinery
import os
import platform
import sys
from functools import cache
from pathlib import Path

from deploykit.errors import UsageError

VARIABLE = "DEPLOYKIT_NATIVE_ISA"
"""Environment variable that replaces the CPU's fastest instruction set."""
SLOW = "scalar"
"""The reference in plain C. It runs on every CPU, but is used only if ``VARIABLE`` names it."""
BUILT_FOR = (
    ("linux", "x86_64"), ("linux", "aarch64"), ("darwin", "arm64"), ("darwin", "x86_64"), ("win32", "AMD64"),
)  # fmt: skip
"""``sys.platform`` and ``platform.machine()`` of the machines that setup.py compiles the library for."""


@cache
def lacks() -> str | None:
    """Return a missing requirement on this machine, or None."""
    if not _has_compiler():
        return "it is built for x86-64, and for 64-bit Arm on Linux and macOS"
    if library_file() is None:
        return f"not built: {_why_not_built()}"
    try:
        found = instruction_sets()
    except OSError as error:
        return str(error)
    return None if found[0] != SLOW or os.environ.get(VARIABLE) == SLOW else "no avx2 and fma in this CPU"


def remedy() -> str:
    """Return what to do about ``lacks()``."""
    if _has_compiler() and library_file() is None:
        return "reinstall deploykit with pip install -v --force-reinstall --no-deps: it compiles the engine, and shows an error whole"
    return "use another engine: pip install 'deploykit[cpu,openvino]'"


def _has_compiler() -> bool:
    """Return whether an installation on this machine compiles the library."""
    return (sys.platform, platform.machine()) in BUILT_FOR


def _why_not_built() -> str:
    """Return the compiler's error, as the installation recorded it, in one line."""
    try:
        lines = Path(__file__).with_name("_native.error").read_text(encoding="utf-8").splitlines()
    except OSError:
        return "this installation has not compiled it"
    return "the compiler failed: " + next((line for line in lines if "error" in line.lower()), lines[0])


def library_file() -> Path | None:
    """Return the path of the library that the installation built, or None."""
    files = (Path(__file__).with_name(f"_native{suffix}") for suffix in importlib.machinery.EXTENSION_SUFFIXES)
    return next((file for file in files if file.is_file()), None)


@cache
def instruction_sets() -> tuple[str, ...]:
    """Return the instruction sets that the library has kernels for and this CPU supports, fastest first."""
    library = _load()
    found: list[str] = []
    while table := library.deploykit_kernels(len(found)):
        name: bytes = ctypes.cast(table, ctypes.POINTER(ctypes.c_char_p))[0]
        found.append(name.decode())
    return tuple(found)


def instruction_set() -> str:
    """Return the instruction set for models opened from now on.

    Raises UsageError if the environment variable names one that does not run here.
    """
    found = instruction_sets()
    name = os.environ.get(VARIABLE) or found[0]
    if name not in found:
        raise UsageError(
            f"{VARIABLE}={name}: the engine native has no such kernels for this CPU",
            f"unset it, or choose one of: {', '.join(found)}",
        )
    return name


def open_library() -> ctypes.CDLL:
    """Load the library. The caller declares the functions that it uses; ``deploykit_free`` is declared already.

    Models that it opens use ``instruction_set()``. Raises UsageError as that function does.
    """
    library = _load()
    library.deploykit_choose_isa(instruction_set().encode())
    return library


@cache
def _load() -> ctypes.CDLL:
    library = ctypes.CDLL(str(library_file()))
    library.deploykit_free.argtypes = (ctypes.c_void_p,)
    library.deploykit_free.restype = None
    library.deploykit_choose_isa.argtypes = (ctypes.c_char_p,)
    library.deploykit_kernels.argtypes = (ctypes.c_int,)
    library.deploykit_kernels.restype = ctypes.c_void_p
    return library
