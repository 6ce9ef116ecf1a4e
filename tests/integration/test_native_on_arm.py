"""Kernels for Arm give the same bits as plain C, on emulated CPUs: native_kernels.c, with the engine, run by qemu."""

from __future__ import annotations

import importlib.util
import runpy
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
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
    """Compile native_kernels.c and the engine for Arm, as setup.py does. That takes a minute of a CPU, and later a
    second: Zig keeps what it compiled."""
    folder = tmp_path_factory.mktemp("arm")
    build = runpy.run_path(str(ROOT / "setup.py"))
    sources = {**build["native_sources"]("aarch64"), str(Path(__file__).with_name("native_kernels.c")): "generic"}

    def compiled(source: str) -> str:
        out = str(folder / f"{Path(source).stem}.o")
        compiler = build["compiler"](build["TARGETS"]["linux-aarch64"].zig, sources[source])
        subprocess.run((*compiler, "-c", source, "-o", out), cwd=ROOT, check=True)
        return out

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, sources))
    subprocess.run((LINKER, "-static", *objects, "-o", str(folder / "kernels"), "-lm", "-lpthread"), check=True)
    return folder / "kernels"


@pytest.mark.parametrize("cpu", CPUS)
def test_kernels_equal_the_reference_on_an_emulated_cpu(program: Path, cpu: str) -> None:
    done = subprocess.run((str(QEMU), "-cpu", cpu, str(program)), capture_output=True, text=True)
    assert (done.stdout.strip(), done.stderr, done.returncode) == (CPUS[cpu], "", 0)
