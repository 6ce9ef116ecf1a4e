"""A process of Triton that has died counts only while Triton does not wait for its end."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from deploykit.triton import process
from deploykit.triton.process import TritonProcess


def test_a_process_that_triton_waited_for_did_not_die(monkeypatch: pytest.MonkeyPatch) -> None:
    dead: list[str] = []
    now = 0.0
    monkeypatch.setattr(process, "_children", lambda pid, recursive: list(dead))
    monkeypatch.setattr(process, "_status", lambda child: psutil.STATUS_ZOMBIE)
    monkeypatch.setattr(process, "time", SimpleNamespace(monotonic=lambda: now))
    triton: Any = SimpleNamespace(pid=1)
    died = TritonProcess._watch_for_deaths(triton)
    dead.append("a shell of Triton, seen before Triton waits for it")
    assert not died()
    dead.clear()
    now = 10.0
    assert not died()
    dead.append("a stub")
    assert not died()
    now = 13.0
    assert died()
