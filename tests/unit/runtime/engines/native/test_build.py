"""The engine ``native`` was compiled. Its other tests are skipped if it cannot run."""

from __future__ import annotations

import platform
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from deploykit.runtime.engines.native import loader

ROOT = Path(__file__).parents[5]

needs_library = pytest.mark.skipif(
    (sys.platform, platform.machine()) not in loader.BUILT_FOR, reason="it is not built for this machine"
)


@needs_library
def test_the_installation_has_built_the_library() -> None:
    assert loader.library_file() is not None, "the compiler failed: pip install -v -e . shows its error"


@needs_library
def test_a_missing_library_is_reported_on_every_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "library_file", lambda: None)
    assert str(loader.lacks.__wrapped__()).startswith("not built")


@needs_library
def test_it_finds_what_the_cpu_has() -> None:
    cpuinfo = Path("/proc/cpuinfo").read_text()
    flags = set(re.search(r"^(?:flags|Features)\s*:(.*)$", cpuinfo, re.M)[1].split())  # type: ignore[index]
    if platform.machine() == "aarch64":
        needs = {"i8mm": {"asimddp", "i8mm"}, "dotprod": {"asimddp"}, "neon": {"asimd"}}
    else:
        avx512 = {"avx512bw", "avx512vl"}
        needs = {
            "amx": avx512 | {"avx512_vnni", "amx_tile", "amx_int8"},
            "avx512vnni": avx512 | {"avx512_vnni"},
            "avx512": avx512,
            "avxvnni": {"avx2", "fma", "avx_vnni"},
            "avx2": {"avx2", "fma"},
        }
    expected = [name for name, wanted in needs.items() if wanted <= flags]
    assert loader.instruction_sets() == (*expected, "scalar")
    assert (loader.lacks() is None) == bool(expected)


SMALL_SIGNAL_STACK = """
import ctypes, sys
class Stack(ctypes.Structure):
    _fields_ = (("at", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))
memory = ctypes.create_string_buffer(8000)  # Linux gives no tiles to a process whose signal stacks cannot save them
assert ctypes.CDLL(None).sigaltstack(ctypes.byref(Stack(ctypes.addressof(memory), 0, 8000)), None) == 0
from deploykit.cli.doctor import command
command.main([], standalone_mode=False)
"""


@needs_library
@pytest.mark.skipif("amx" not in loader.instruction_sets(), reason="this CPU has no AMX")
def test_without_tiles_the_next_instruction_set_is_used_and_doctor_says_so() -> None:
    run = subprocess.run([sys.executable, "-c", SMALL_SIGNAL_STACK], capture_output=True, text=True, check=True)
    said = next(line for line in run.stdout.splitlines() if line.startswith("native"))
    assert said.startswith("native    avx512vnni; this CPU runs avx512vnni, avx512, avxvnni, avx2, scalar (")
    assert said.endswith("(Linux does not give AMX to this process)")


def test_every_file_in_c_is_compiled_for_an_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    build = runpy.run_path("setup.py")
    compiled = {file for architecture in build["CPUS"] for file in build["native_sources"](architecture)}
    assert compiled == set(map(str, build["CSRC"].rglob("*.c")))
    assert {target.architecture for target in build["TARGETS"].values()} == set(build["CPUS"])


def test_an_unknown_target_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("DEPLOYKIT_TARGET", "linux-riscv64")
    with pytest.raises(SystemExit, match="linux-riscv64: unknown; choose one of: linux-x86_64, linux-aarch64"):
        runpy.run_path("setup.py")["extensions"]()
