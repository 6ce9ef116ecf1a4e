"""Fixtures of the unit tests."""

from __future__ import annotations

import gc
from typing import Any

import pytest


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A fake GPU; fails if memory or other resources are not released."""
    # The GPU machine collects these tests, and has no tensorrt_rtx, which the fake needs.
    from fake_gpu import FakeDriver, install_driver

    fake = FakeDriver()
    install_driver(monkeypatch, fake)
    yield fake
    gc.collect()
    assert fake.in_use == 0
