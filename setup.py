"""Compiles the engine ``native``, by Zig's C compiler: a Python package, so that no machine needs a compiler of its own.

Where it cannot be compiled for, the package goes without that engine.
"""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

TARGET = "x86_64-linux-gnu.2.17"
CPU = "x86_64_v4+avx512vnni"


class BuildNative(build_ext):
    """A shared library that ctypes loads: it has no Python in it."""

    def build_extension(self, ext: Extension) -> None:
        out = Path(self.get_ext_fullpath(ext.name))
        out.parent.mkdir(parents=True, exist_ok=True)
        flags = [
            "-O3",
            "-std=gnu11",
            "-Wall",
            "-Wextra",
            "-Werror",
            "-shared",
            "-fPIC",
            "-target",
            TARGET,
            f"-mcpu={CPU}",
        ]
        command = [sys.executable, "-m", "ziglang", "cc", *flags, *ext.sources, "-o", str(out), "-lm", "-lpthread"]
        if subprocess.run(command, check=False).returncode:
            raise CompileError(f"{' '.join(command)} failed")


native = Extension(
    "deploykit.runtime.engines._native", ["deploykit/runtime/engines/native.c"], py_limited_api=True, optional=True
)
here = sys.platform == "linux" and platform.machine() == "x86_64"
setup(ext_modules=[native] if here else [], cmdclass={"build_ext": BuildNative})
