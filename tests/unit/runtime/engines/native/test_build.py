"""The engine ``native`` was compiled. Its other tests are skipped if it cannot run."""

from __future__ import annotations

import importlib.machinery
import platform
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from native_builds import BUILD
from paths import ROOT
from setuptools import Distribution

from deploykit.cli.doctor import command
from deploykit.runtime.engines.native import loader

CPUINFO = Path("/proc/cpuinfo")

needs_library = pytest.mark.skipif(
    (sys.platform, platform.machine()) not in loader.BUILT_FOR, reason="it is not built for this machine"
)


@needs_library
def test_the_installation_has_built_the_library() -> None:
    assert loader.library_file() is not None, f"{loader.lacks()}; {loader.remedy()}"


@needs_library
def test_a_missing_library_is_reported_on_every_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "library_file", lambda: None)
    assert loader.lacks.__wrapped__() == "not built: this installation has not compiled it"


@needs_library
def test_doctor_shows_why_the_compiler_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """The build writes the file that the loader reads, and removes it when it succeeds."""
    setup = runpy.run_path(str(ROOT / "setup.py"))
    broken, whole = tmp_path / "broken.c", tmp_path / "whole.c"
    broken.write_text("int broken(void) { return missing; }\n")
    whole.write_text("int whole(void) { return 1; }\n")
    monkeypatch.chdir(tmp_path)
    package = tmp_path / "lib" / "package"

    def build(source: Path) -> None:
        extension = setup["Extension"]("package._native", [str(source)])
        command = setup["BuildNative"](Distribution({"ext_modules": [extension]}))
        command.build_lib, command.build_temp = "lib", "temp"
        command.ensure_finalized()
        command.build_extension(extension)

    with pytest.raises(setup["CompileError"], match="missing"):
        build(broken)
    monkeypatch.setattr(loader, "__file__", str(package / "loader.py"))
    assert re.fullmatch(
        "not built: the compiler failed: .*error: use of undeclared identifier 'missing'", loader.lacks.__wrapped__()
    )
    assert "pip install -v" in loader.remedy()
    loader.lacks.cache_clear()
    request.addfinalizer(loader.lacks.cache_clear)
    shown = CliRunner().invoke(command, []).output
    assert "native    not built: the compiler failed: " in shown
    assert "remedy: reinstall deploykit" in shown
    build(whole)
    assert loader.library_file() is not None
    assert not (package / "_native.error").exists()


def test_another_platform_needs_another_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    assert loader.lacks.__wrapped__() == "it is built for x86-64, and for 64-bit Arm on Linux and macOS"
    assert loader.remedy().startswith("use another engine")


@pytest.mark.parametrize(
    ("target", "suffixes"),
    [
        ("linux-aarch64", [".cpython-311-aarch64-linux-gnu.so", ".abi3.so", ".so"]),
        ("darwin-arm64", [".cpython-311-darwin.so", ".abi3.so", ".so"]),
        ("win32-AMD64", [".cp311-win_amd64.pyd", ".pyd"]),
    ],
)
def test_the_library_is_found_by_each_systems_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str, suffixes: list[str]
) -> None:
    monkeypatch.setattr(importlib.machinery, "EXTENSION_SUFFIXES", suffixes)
    monkeypatch.setattr(loader, "__file__", str(tmp_path / "loader.py"))
    assert loader.library_file() is None
    library = tmp_path / f"_native{BUILD['TARGETS'][target].suffix}"
    library.touch()
    assert loader.library_file() == library


@pytest.mark.skipif(not CPUINFO.exists(), reason="only Linux lists the CPU's features there")
def test_it_finds_what_the_cpu_has() -> None:
    flags = set(re.search(r"^(?:flags|Features)\s*:(.*)$", CPUINFO.read_text(), re.M)[1].split())  # type: ignore[index]
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
@pytest.mark.skipif(loader.lacks() is not None or "amx" not in loader.instruction_sets(), reason="no AMX here")
def test_without_tiles_the_next_instruction_set_is_used_and_doctor_says_so() -> None:
    run = subprocess.run([sys.executable, "-c", SMALL_SIGNAL_STACK], capture_output=True, text=True, check=True)
    said = next(line for line in run.stdout.splitlines() if line.startswith("native"))
    assert said.startswith("native    avx512vnni; this CPU runs avx512vnni, avx512, avxvnni, avx2, scalar (")
    assert said.endswith("(Linux does not give AMX to this process)")


def test_every_file_in_c_is_compiled_for_an_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    compiled = {file for architecture in BUILD["CPUS"] for file in BUILD["native_sources"](architecture)}
    assert compiled == set(map(str, BUILD["CSRC"].rglob("*.c")))
    assert {target.architecture for target in BUILD["TARGETS"].values()} == set(BUILD["CPUS"])


def test_the_library_is_expected_where_it_is_built() -> None:
    assert {"-".join(system) for system in loader.BUILT_FOR} == set(BUILD["TARGETS"])


def test_an_unknown_target_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("DEPLOYKIT_TARGET", "linux-riscv64")
    with pytest.raises(SystemExit, match="linux-riscv64: unknown; choose one of: linux-x86_64, linux-aarch64"):
        runpy.run_path("setup.py")["extensions"]()
