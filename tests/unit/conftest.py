"""Fixtures of the unit tests."""

from __future__ import annotations

import gc
from typing import Any

import pytest
from fake_gpu import FakeDriver, install_driver


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A fake GPU; fails if memory or other resources are not released."""
    fake = FakeDriver()
    install_driver(monkeypatch, fake)
    yield fake
    gc.collect()
    assert fake.in_use == 0
