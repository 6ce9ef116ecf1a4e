"""Hold that the engine ``native`` was compiled: all its other tests are skipped where it cannot run."""

from __future__ import annotations

import platform
import sys

import pytest

from deploykit.runtime.engines import native_library


@pytest.mark.skipif(sys.platform != "linux" or platform.machine() != "x86_64", reason="it is built for x86-64 Linux")
def test_the_installation_has_built_the_library() -> None:
    assert native_library.library_file() is not None, "the compiler failed: pip install -v -e . shows its error"


@pytest.mark.skipif(sys.platform != "linux" or platform.machine() != "x86_64", reason="it is built for x86-64 Linux")
def test_a_library_that_was_not_built_is_said_whatever_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_library, "library_file", lambda: None)
    assert str(native_library.lacks.__wrapped__()).startswith("not built")
