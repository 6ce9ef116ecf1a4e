"""Compiles the engine ``native`` and the guard in front of Triton, by Zig's C compiler: a Python package, so that no
machine needs a compiler of its own.

Where they cannot be compiled for, the package goes without; if the compiler fails, a file beside them says why, for
``deploykit doctor``. ``DEPLOYKIT_TARGET``, a key of ``TARGETS``, compiles for another
machine, as ``make wheels`` does.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

CSRC = Path("deploykit/runtime/engines/native/csrc")
GUARD = Path("deploykit/triton/guard")
CPUS = {
    "x86_64": {
        "scalar": "x86_64",
        "avx2": "x86_64_v3",
        "avxvnni": "x86_64_v3+avxvnni+fast_dpwssd",
        "avx512": "x86_64_v4",
        "avx512vnni": "x86_64_v4+avx512vnni+fast_dpwssd",
        "amx": "x86_64_v4+avx512vnni+amx_tile+amx_int8+fast_dpwssd",
    },
    "aarch64": {"scalar": "generic", "neon": "generic", "dotprod": "generic+dotprod", "i8mm": "generic+dotprod+i8mm"},
}
"""What the compiler may use in each file of csrc/isa/; in all others, the same as in scalar.c. The library runs on any CPU of
its architecture: it looks which instruction sets the CPU has. Without fast_dpwssd, the compiler replaces most VPDPWSSD by two
instructions."""


class Target(NamedTuple):
    """A machine to compile for: its architecture, Zig's name for it, the platform in the names of wheels, and how names of
    extension modules end there."""

    architecture: str
    zig: str
    wheel: str
    suffix: str = ".abi3.so"


# By sys.platform and platform.machine().
TARGETS = {
    "linux-x86_64": Target("x86_64", "x86_64-linux-gnu.2.17", "manylinux_2_17_x86_64.manylinux2014_x86_64"),
    "linux-aarch64": Target("aarch64", "aarch64-linux-gnu.2.17", "manylinux_2_17_aarch64.manylinux2014_aarch64"),
    "darwin-arm64": Target("aarch64", "aarch64-macos.11.0", "macosx_11_0_arm64"),
    "darwin-x86_64": Target("x86_64", "x86_64-macos.10.13", "macosx_10_13_x86_64"),
    "win32-AMD64": Target("x86_64", "x86_64-windows-gnu", "win_amd64", ".pyd"),
}
FAILURE = ".error"
"""Suffix of the file with the compiler's error, beside where the library would be (``loader.py`` reads it)."""
FLAGS = (
    "-O3", "-std=gnu11", "-Wall", "-Wextra", "-Werror", "-fPIC", "-fvisibility=hidden", "-g0",
    "-ffp-contract=off",  # a compiler that fuses products and sums where it can would round differently for each CPU
)  # fmt: skip


def compiler(target: str, cpu: str) -> tuple[str, ...]:
    """Return the command that compiles for a target of Zig's and a CPU."""
    return (sys.executable, "-m", "ziglang", "cc", *FLAGS, "-target", target, f"-mcpu={cpu}")


def native_sources(architecture: str) -> dict[str, str]:
    """Return the engine's files for an architecture, and the CPU to compile each for."""
    cpus = CPUS[architecture]
    return {str(file): cpus["scalar"] for file in sorted(CSRC.glob("*.c"))} | {
        str(CSRC / "isa" / f"{name}.c"): cpu for name, cpu in cpus.items()
    }


def chosen_target() -> str:
    return os.environ.get("DEPLOYKIT_TARGET") or f"{sys.platform}-{platform.machine()}"


class BuildNative(build_ext):
    """Build shared libraries that have no Python in them."""

    _beside_sources = False

    def run(self) -> None:
        self._beside_sources = bool(self.inplace)  # setuptools unsets it while it builds
        super().run()

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + TARGETS[chosen_target()].suffix

    def build_extension(self, ext: Extension) -> None:
        name = Path(*ext.name.split(".")).with_suffix(FAILURE)
        reports = [Path(self.build_lib) / name, *([name] if self._beside_sources else [])]
        for report in reports:
            report.unlink(missing_ok=True)
        try:
            self._compile(ext)
        except CompileError as error:
            for report in reports:
                report.parent.mkdir(parents=True, exist_ok=True)
                report.write_text(str(error), encoding="utf-8")
            raise

    def _compile(self, ext: Extension) -> None:
        target = TARGETS[chosen_target()]
        cpus = native_sources(target.architecture)
        out = Path(self.get_ext_fullpath(ext.name))
        temporary = Path(self.build_temp) / chosen_target()
        for folder in (out.parent, temporary):
            folder.mkdir(parents=True, exist_ok=True)
        objects = []
        plain = compiler(target.zig, CPUS[target.architecture]["scalar"])
        for source in ext.sources:
            objects.append(str(temporary / f"{Path(source).stem}.o"))
            command = compiler(target.zig, cpus[source]) if source in cpus else plain
            _run(*command, "-c", source, "-o", objects[-1])
        # Beside a library for Windows, the linker writes files that are not part of the wheel.
        linked = temporary / out.name
        _run(*plain, "-shared", *objects, "-o", str(linked), *(f"-l{name}" for name in ext.libraries))
        shutil.copy(linked, out)


class NameWheel(bdist_wheel):
    """Name wheels by the machine that they are compiled for. They suit every version of Python."""

    def get_tag(self) -> tuple[str, str, str]:
        target = TARGETS.get(chosen_target())
        return ("py3", "none", target.wheel if target else "any")


def _run(*command: str) -> None:
    done = subprocess.run(command, check=False, stderr=subprocess.PIPE, text=True, errors="replace")
    sys.stderr.write(done.stderr)
    if done.returncode:
        said = done.stderr.strip() or f"exit status {done.returncode}"
        raise CompileError(f"{said}\n{' '.join(command)} failed")


def extensions() -> list[Extension]:
    name = chosen_target()
    asked = "DEPLOYKIT_TARGET" in os.environ
    if asked and name not in TARGETS:
        raise SystemExit(f"DEPLOYKIT_TARGET={name}: unknown; choose one of: {', '.join(TARGETS)}")
    if name not in TARGETS:
        return []
    native = Extension(
        "deploykit.runtime.engines.native._native",
        list(native_sources(TARGETS[name].architecture)),
        depends=sorted(map(str, CSRC.rglob("*.h"))),
        libraries=["m", "pthread"],
        py_limited_api=True,
        optional=not asked,
    )
    guard = Extension(
        "deploykit.triton.guard._guard",
        sorted(map(str, GUARD.glob("*.c"))),
        depends=sorted(map(str, GUARD.glob("*.h"))),
        libraries=["dl", "pthread"],
        py_limited_api=True,
        optional=not asked,
    )
    return [native, guard] if name == "linux-x86_64" else [native]  # the embedded Triton runs there only


if __name__ == "__main__":
    setup(
        ext_modules=extensions(),
        cmdclass={"build_ext": BuildNative, "bdist_wheel": NameWheel},
        # In one folder, a wheel would have what was built for another target.
        options={"build": {"build_base": f"build/{chosen_target()}"}},
    )
