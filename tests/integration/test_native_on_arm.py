"""Kernels for Arm give the same bits as plain C, on emulated CPUs: native_kernels.c, with the engine, run by qemu."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from pathlib import Path

import pytest
from native_builds import KERNELS, compile_engine

QEMU = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
LINKER = shutil.which("aarch64-linux-gnu-gcc")
"""It has a C library for Arm, which Zig would have to compile first."""
CPUS = {"cortex-a72": "neon scalar", "neoverse-n1": "dotprod neon scalar", "max": "i8mm dotprod neon scalar"}
"""Models of qemu's, and the instruction sets that the engine has for each. Only newer versions of qemu have a Neoverse V1."""

pytestmark = [
    pytest.mark.skipif(not QEMU, reason="no qemu: sudo apt-get install qemu-user-static"),
    pytest.mark.skipif(
        not LINKER, reason="no linker for Arm: sudo apt-get install gcc-aarch64-linux-gnu libc6-dev-arm64-cross"
    ),
    pytest.mark.skipif(importlib.util.find_spec("ziglang") is None, reason="no Zig: pip install ziglang"),
]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("arm")
    objects = compile_engine(folder, "linux-aarch64", KERNELS)
    subprocess.run((LINKER, "-static", *objects, "-o", str(folder / "kernels"), "-lm", "-lpthread"), check=True)
    return folder / "kernels"


@pytest.mark.parametrize("cpu", CPUS)
def test_kernels_equal_the_reference_on_an_emulated_cpu(program: Path, cpu: str) -> None:
    done = subprocess.run((str(QEMU), "-cpu", cpu, str(program)), capture_output=True, text=True)
    assert (done.stdout.strip(), done.stderr, done.returncode) == (CPUS[cpu], "", 0)
