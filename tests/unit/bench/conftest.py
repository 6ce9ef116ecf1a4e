"""Fixtures of the tests of bench/."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
from paths import ROOT


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Import a module of bench/."""
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    return importlib.import_module
