"""Compiles the engine ``native`` and the guard in front of Triton, by Zig's C compiler: a Python package, so that no
machine needs a compiler of its own.

Where they cannot be compiled for, the package goes without.
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
CSRC = Path("deploykit/runtime/engines/native/csrc")
CPU = "x86_64"
CPU_OF_ISA = {"avx512vnni": "x86_64_v4+avx512vnni", "avx2": "x86_64_v3", "scalar": CPU}
"""What the compiler may use in a file of csrc/isa/. The library runs on any CPU: it looks which of them the CPU has."""
FLAGS = (
    "-O3", "-std=gnu11", "-Wall", "-Wextra", "-Werror", "-fPIC", "-fvisibility=hidden", "-g0", "-target", TARGET,
    "-ffp-contract=off",  # a compiler that fuses products and sums where it can would round differently for each CPU
)  # fmt: skip


class BuildNative(build_ext):
    """Build shared libraries that have no Python in them."""

    def build_extension(self, ext: Extension) -> None:
        out = Path(self.get_ext_fullpath(ext.name))
        temporary = Path(self.build_temp)
        for folder in (out.parent, temporary):
            folder.mkdir(parents=True, exist_ok=True)
        objects = []
        for source in map(Path, ext.sources):
            cpu = CPU_OF_ISA[source.stem] if source.parent.name == "isa" else CPU
            objects.append(temporary / f"{source.stem}.o")
            self._compile(f"-mcpu={cpu}", "-c", str(source), "-o", str(objects[-1]))
        self._compile("-shared", *map(str, objects), "-o", str(out), "-lm", "-lpthread", "-ldl")

    def _compile(self, *arguments: str) -> None:
        command = [sys.executable, "-m", "ziglang", "cc", *FLAGS, *arguments]
        if subprocess.run(command, check=False).returncode:
            raise CompileError(f"{' '.join(command)} failed")


native = Extension(
    "deploykit.runtime.engines.native._native",
    sorted(map(str, CSRC.rglob("*.c"))),
    depends=sorted(map(str, CSRC.rglob("*.h"))),
    py_limited_api=True,
    optional=True,
)
guard = Extension(
    "deploykit.triton.guard._guard",
    ["deploykit/triton/guard/guard.c"],
    depends=["deploykit/triton/guard/triton.h"],
    py_limited_api=True,
    optional=True,
)
here = sys.platform == "linux" and platform.machine() == "x86_64"
setup(ext_modules=[native, guard] if here else [], cmdclass={"build_ext": BuildNative})
