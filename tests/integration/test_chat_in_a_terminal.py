"""``deploykit chat`` as it is used: typed into a terminal."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from language_models import write_export

from deploykit.artifacts import load_manifest
from deploykit.errors import DataError
from deploykit.runtime.sampling import Sampling
from deploykit.tasks.opening import open_graph
from deploykit.tasks.text_generation.chat_template import CHATML
from deploykit.tasks.text_generation.generator import LocalGenerator

CTRL_C, CTRL_D = "\x03", "\x04"
LINE = "list the file here"
PROMPT = re.compile(r"(?:^|\n)> $")


def _in_terminal() -> None:
    """Make standard input the controlling terminal, and have Ctrl-C noticed, also where the tests run in the background."""
    os.close(os.open(os.ttyname(0), os.O_RDWR))
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Terminal:
    """A pseudo-terminal with a command in it. ``shown`` is all that it showed."""

    def __init__(self, *words: str) -> None:
        self._screen, terminal = pty.openpty()
        environment = {**os.environ, "TERM": "dumb"}
        self.process = subprocess.Popen(
            words, stdin=terminal, stdout=terminal, stderr=terminal, env=environment, start_new_session=True,
            preexec_fn=_in_terminal,
        )  # fmt: skip
        os.close(terminal)
        self.shown = ""
        self._bytes = b""

    def type(self, text: str) -> None:
        os.write(self._screen, text.encode())

    def read(self, seconds: float = 60.0) -> bool:
        """Read what is shown next. Returns whether there was anything."""
        if not select.select([self._screen], [], [], seconds)[0]:
            return False
        with contextlib.suppress(OSError):  # the command ended
            if new := os.read(self._screen, 65536):
                self._bytes += new
                self.shown = self._bytes.decode(errors="replace").replace("\r\n", "\n")
                return True
        return False

    def read_until(self, pattern: re.Pattern[str], begin: int = 0) -> str:
        """Return what is shown from ``begin`` on, once it ends in ``pattern``."""
        deadline = time.monotonic() + 60
        while not pattern.search(self.shown[begin:]):
            assert time.monotonic() < deadline, self.shown
            assert self.read(), self.shown
        return self.shown[begin:]

    def ask(self, line: str) -> str:
        """Type a line. Returns what is shown up to the next prompt, without the echo of the line."""
        begin = len(self.shown)
        self.type(f"{line}\n")
        shown = self.read_until(PROMPT, begin)
        assert shown.startswith(f"{line}\n")
        return PROMPT.sub("", shown.removeprefix(f"{line}\n"))

    def interrupt_until(self, text: str) -> None:
        """Type Ctrl-C until ``text`` is shown, and then a prompt. One that comes after the prompt is written, but before the
        line is read, is only noticed with the next."""
        begin = len(self.shown)
        while text not in self.shown[begin:]:
            self.type(CTRL_C)
            while self.read(5.0) and text not in self.shown[begin:]:
                pass
        self.read_until(PROMPT, begin)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._screen)


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_export(tmp_path_factory.mktemp("lm") / "export", template=CHATML, max_position_embeddings=4096)


@pytest.fixture
def terminal(export: Path, request: pytest.FixtureRequest) -> Iterator[Terminal]:
    words = [sys.executable, "-m", "deploykit", "chat", str(export), "--max-new-tokens", *request.param]
    with contextlib.closing(Terminal(*words)) as terminal:
        terminal.read_until(PROMPT)
        assert "Ctrl-C stops an answer" in terminal.shown
        yield terminal


@pytest.mark.parametrize("terminal", [["20"]], indirect=True)
def test_a_dialog_is_remembered_until_reset_and_ctrl_d_ends_it(terminal: Terminal, export: Path) -> None:
    generator = open_graph(export, load_manifest(export), threads=1)
    assert isinstance(generator, LocalGenerator)
    asked, answers = [{"role": "user", "content": LINE}], []
    for _ in range(2):
        [answer] = generator.reply([asked], Sampling(max_new_tokens=20))
        assert not isinstance(answer, DataError)
        answers.append(answer[0].text)
        asked += [{"role": "assistant", "content": answer[0].text}, {"role": "user", "content": LINE}]
    assert answers[0] != answers[1]

    def shown(text: str) -> str:
        return text.replace("\r\n", "\n")

    assert [terminal.ask(LINE), terminal.ask(LINE)] == [shown(answer) for answer in answers]
    assert terminal.ask("/reset") == "a new dialog"
    assert terminal.ask(LINE) == shown(answers[0])
    terminal.interrupt_until("Ctrl-D ends")
    assert terminal.ask(LINE) == shown(answers[1]), "the dialog goes on"
    terminal.type(CTRL_D)
    assert terminal.process.wait(30) == 0
    while terminal.read(0.2):
        pass
    assert "Traceback" not in terminal.shown


@pytest.mark.parametrize("terminal", [["3900", "--ignore-eos"]], indirect=True)
def test_an_answer_streams_and_ctrl_c_stops_it_alone(terminal: Terminal) -> None:
    begin = len(terminal.shown)
    terminal.type(f"{LINE}\n")
    while len(terminal.shown) - begin < len(LINE) + 40:
        assert terminal.read(), "pieces come while the answer is written"
    assert not PROMPT.search(terminal.shown)
    terminal.type(CTRL_C)
    first = terminal.read_until(PROMPT, begin)
    assert terminal.process.poll() is None
    assert terminal.ask("/reset") == "a new dialog"
    begin = len(terminal.shown)
    terminal.type(f"{LINE}\n")
    while len(terminal.shown) - begin < len(LINE) + 40:
        assert terminal.read()
    again = terminal.shown[begin:]
    assert first[: len(LINE) + 30] == again[: len(LINE) + 30], "it answers as before"
    terminal.type(CTRL_C)
    terminal.read_until(PROMPT, begin)
    terminal.type("/exit\n")
    assert terminal.process.wait(30) == 0
    assert "Traceback" not in terminal.shown
