"""The engine ``native`` is built for macOS and Windows; its kernels give the same bits as plain C in Windows programs."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from native_builds import BUILD, KERNELS, compile_engine, link, read_dll, read_mach_o

CSRC = BUILD["CSRC"]
API = {
    name
    for file in CSRC.glob("*.c")
    for name in re.findall(r"^API .*?\b(deploykit_\w+)\(", file.read_text(), re.MULTILINE)
}
WINE = shutil.which("wine")

pytestmark = pytest.mark.skipif(importlib.util.find_spec("ziglang") is None, reason="no Zig: pip install ziglang")


@pytest.mark.parametrize(("target", "system"), [("darwin-arm64", "11.0"), ("darwin-x86_64", "10.13")])
def test_a_library_for_macos_exports_the_functions_and_needs_the_version_in_the_wheels_name(
    tmp_path: Path, target: str, system: str
) -> None:
    objects = compile_engine(tmp_path, target, optimize=False)  # read, not run
    link(target, tmp_path / "library", "-shared", *objects)
    library = read_mach_o((tmp_path / "library").read_bytes())
    assert library.kind == target.removeprefix("darwin-")
    assert library.exports == API
    assert library.needs == {"/usr/lib/libSystem.B.dylib"}
    assert library.system == system
    assert BUILD["TARGETS"][target].wheel == f"macosx_{system.replace('.', '_')}_{library.kind}"


@pytest.fixture(scope="module")
def for_windows(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    folder = tmp_path_factory.mktemp("windows")
    if WINE:
        return folder, compile_engine(folder, "win32-AMD64", KERNELS)
    return folder, compile_engine(folder, "win32-AMD64", optimize=False)  # read, not run


def test_a_library_for_windows_exports_the_functions_and_needs_what_windows_has(
    for_windows: tuple[Path, list[str]],
) -> None:
    folder, objects = for_windows
    link("win32-AMD64", folder / "library.pyd", "-shared", *(o for o in objects if Path(o).stem != KERNELS.stem))
    library = read_dll((folder / "library.pyd").read_bytes())
    assert library.kind == "x86_64"
    assert library.exports == API
    assert {name for name in library.needs if not name.startswith("api-ms-win-crt-")} == {"KERNEL32.dll"}


@pytest.mark.skipif(not WINE, reason="no wine: sudo apt-get install wine64 wine")
def test_kernels_equal_the_reference_in_a_program_for_windows(for_windows: tuple[Path, list[str]]) -> None:
    folder, objects = for_windows
    link("win32-AMD64", folder / "kernels.exe", *objects)
    environment = {**os.environ, "WINEPREFIX": str(folder / "wine"), "WINEDEBUG": "-all"}
    subprocess.run((str(WINE), "wineboot", "--init"), env=environment, check=True, capture_output=True)
    done = subprocess.run((str(WINE), folder / "kernels.exe"), env=environment, capture_output=True, text=True)
    assert (done.stderr, done.returncode) == ("", 0)
    assert done.stdout.split()[-1] == "scalar"
