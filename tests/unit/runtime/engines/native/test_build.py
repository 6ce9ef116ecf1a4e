"""The engine ``native`` was compiled. Its other tests are skipped if it cannot run."""

from __future__ import annotations

import platform
import sys
from pathlib import Path

import pytest

from deploykit.runtime.engines.native import loader


@pytest.mark.skipif(sys.platform != "linux" or platform.machine() != "x86_64", reason="it is built for x86-64 Linux")
def test_the_installation_has_built_the_library() -> None:
    assert loader.library_file() is not None, "the compiler failed: pip install -v -e . shows its error"


@pytest.mark.skipif(sys.platform != "linux" or platform.machine() != "x86_64", reason="it is built for x86-64 Linux")
def test_a_missing_library_is_reported_on_every_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "library_file", lambda: None)
    assert str(loader.lacks.__wrapped__()).startswith("not built")


@pytest.mark.skipif(sys.platform != "linux" or platform.machine() != "x86_64", reason="it is built for x86-64 Linux")
def test_it_runs_on_every_cpu_with_avx2() -> None:
    flags = set(Path("/proc/cpuinfo").read_text().partition("flags")[2].partition("\n")[0].split())
    expected = ["avx512vnni"] * ({"avx512bw", "avx512vl", "avx512_vnni"} <= flags) + ["avx2"] * (
        {"avx2", "fma"} <= flags
    )
    assert loader.instruction_sets() == (*expected, "scalar")
    assert (loader.lacks() is None) == bool(expected)
