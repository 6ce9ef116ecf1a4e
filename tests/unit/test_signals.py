"""Handlers of signals last for a block, and leave those of a program alone."""

from __future__ import annotations

import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from deploykit.signals import STOPPING, handled, unhandled


def test_the_earlier_handlers_are_set_again() -> None:
    before = [signal.getsignal(number) for number in STOPPING]
    stop = threading.Event()

    def run() -> None:
        with handled(lambda *_: stop.set()):
            signal.raise_signal(signal.SIGTERM)
            raise ValueError("failed")

    with pytest.raises(ValueError, match="failed"):
        run()
    assert stop.is_set()
    assert [signal.getsignal(number) for number in STOPPING] == before


def test_a_programs_handler_is_not_unhandled(usual_signals: None) -> None:
    assert signal.SIGTERM in unhandled()
    with handled(lambda *_: None, [signal.SIGTERM]):
        assert signal.SIGTERM not in unhandled()


def test_another_thread_can_set_no_handler() -> None:
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(unhandled).result() == []
