"""A stand-in for the library of the engine ``native`` for Arm."""

from __future__ import annotations

import pytest

from deploykit.jetson import bundle


@pytest.fixture(autouse=True)
def library_for_arm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bundle some bytes: the library takes a minute to compile. tests/integration/test_bundled_library.py compiles it."""
    monkeypatch.setattr(bundle, "library_for_arm", lambda wheels: b"a library for Arm")
