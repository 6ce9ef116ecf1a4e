"""Kernels for AMX and AVX-VNNI give the same bits as plain C on a CPU that has neither: AVX-512 VNNI and plain C replace their
instructions (emulated_x86.h)."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from pathlib import Path

import pytest
from native_builds import KERNELS, compile_engine
from paths import ROOT

from deploykit.runtime.engines.native.loader import instruction_sets, lacks

CSRC = ROOT / "deploykit/runtime/engines/native/csrc"
EMULATED = ("amx", "avxvnni")
CPU = "x86_64_v4+avx512vnni+fast_dpwssd"
HEADER = ROOT / "tests/integration/emulated_x86.h"

pytestmark = [
    pytest.mark.skipif(
        lacks() is not None or "avx512vnni" not in instruction_sets(), reason="this CPU has no AVX-512 VNNI"
    ),
    pytest.mark.skipif(shutil.which("gcc") is None, reason="no linker: sudo apt-get install gcc"),
    pytest.mark.skipif(importlib.util.find_spec("ziglang") is None, reason="no Zig: pip install ziglang"),
]


def test_kernels_for_amx_and_avx_vnni_equal_the_reference(tmp_path: Path) -> None:
    cpu = (CSRC / "cpu.c").read_text(encoding="utf-8")
    for name in EMULATED:
        assert cpu.count(f"&kernels_{name}, has_{name}}}") == 1
        cpu = cpu.replace(f"&kernels_{name}, has_{name}}}", f"&kernels_{name}, has_avx512vnni}}")
    (tmp_path / "cpu.c").write_text(cpu, encoding="utf-8")
    unused = ("-Wno-unused-function",)  # the functions that look for AMX and AVX-VNNI, and those that are replaced
    objects = compile_engine(
        tmp_path, "linux-x86_64", KERNELS, tmp_path / "cpu.c", cpus=dict.fromkeys(EMULATED, CPU),
        flags={"cpu": (f"-I{CSRC}", *unused), **dict.fromkeys(EMULATED, ("-include", str(HEADER), *unused))},
    )  # fmt: skip
    # Zig would have to compile a C library first.
    subprocess.run(("gcc", *objects, "-o", str(tmp_path / "kernels"), "-lm", "-lpthread"), check=True)
    done = subprocess.run(str(tmp_path / "kernels"), capture_output=True, text=True)
    assert (done.stdout.split(), done.stderr, done.returncode) == (
        ["amx", "avx512vnni", "avx512", "avxvnni", "avx2", "scalar"], "", 0,
    )  # fmt: skip
