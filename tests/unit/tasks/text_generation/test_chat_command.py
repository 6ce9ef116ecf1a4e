"""What ``deploykit chat`` does where no answer comes."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

from deploykit.cli import main
from deploykit.errors import RequestError, ServerError
from deploykit.runtime.sampling import Sampling


class _Generator:
    """Satisfies what chat needs of ``TextGenerator``: what is asked second to fifth has no whole answer."""

    has_template = True
    task = SimpleNamespace(sampling=Sampling())

    def __init__(self) -> None:
        self.asked: list[list[str]] = []

    def stream(self, messages: Any, sampling: Sampling) -> Iterator[str]:
        self.asked.append([message["content"] for message in messages])
        number = len(self.asked)
        if number == 2:
            raise RequestError("overloaded", 503, "try again later")
        if number == 4:
            signal.raise_signal(signal.SIGINT)
            raise AssertionError("Ctrl-C ends the wait for the first piece")
        yield f"answer {number}"
        if number == 3:
            raise ServerError("the server ended the stream", "see its log")
        if number == 5:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            raise AssertionError("Ctrl-C twice ends the wait for the next piece")

    def close(self) -> None: ...


def test_errors_of_the_server_and_ctrl_c_leave_the_dialog(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    generator = _Generator()
    monkeypatch.setattr("deploykit.tasks.opening.open_generator", lambda *_, **__: generator)
    before = signal.getsignal(signal.SIGINT)
    done = CliRunner().invoke(main, ["chat", "lm"], input="a\nb\nc\nd\ne\nf\n")
    assert done.exit_code == 0, done.output
    assert "error: overloaded\nremedy: try again later\n" in done.output
    assert "error: the server ended the stream\n" in done.output
    assert generator.asked == [
        ["a"],
        ["a", "answer 1", "b"],
        ["a", "answer 1", "c"],
        ["a", "answer 1", "d"],
        ["a", "answer 1", "e"],
        ["a", "answer 1", "e", "answer 5", "f"],
    ]
    assert capfd.readouterr().out == "answer 1\nanswer 3\n\nanswer 5\nanswer 6\n"
    assert signal.getsignal(signal.SIGINT) is before
