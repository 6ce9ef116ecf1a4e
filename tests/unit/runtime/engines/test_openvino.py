from __future__ import annotations

import ctypes
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from deploykit.artifacts import load_manifest
from deploykit.runtime.find_graphs import find_graphs
from deploykit.runtime.signal_stack import _Stack, kept_signal_stack

pytest.importorskip("openvino")


def stack() -> tuple[int | None, int, int]:
    found = _Stack()
    ctypes.CDLL(None).sigaltstack(None, ctypes.byref(found))
    return found.place, found.flags, found.size


def test_a_signal_is_handled_after_models_are_freed_in_any_order(
    make_tiny_export: Callable[..., Path], tmp_path: Path
) -> None:
    from deploykit.runtime.engines.openvino import OpenVinoEngine

    export = make_tiny_export(tmp_path / "export")
    graphs = find_graphs(export, load_manifest(export), engine="openvino", precision="fp32")
    before, handled = stack(), []
    earlier = OpenVinoEngine(export / graphs.files[0], 1)
    later = OpenVinoEngine(export / graphs.files[0], 1)
    del earlier
    del later
    assert stack() == before
    old = signal.signal(signal.SIGUSR1, lambda *_: handled.append(1))
    try:
        signal.raise_signal(signal.SIGUSR1)
    finally:
        signal.signal(signal.SIGUSR1, old)
    assert handled == [1]


def test_the_stack_for_signals_is_kept() -> None:
    before = stack()
    memory = ctypes.create_string_buffer(1 << 17)
    with kept_signal_stack():
        assert ctypes.CDLL(None).sigaltstack(ctypes.byref(_Stack(ctypes.addressof(memory), 0, 1 << 17)), None) == 0
        assert stack() != before
    assert stack() == before
