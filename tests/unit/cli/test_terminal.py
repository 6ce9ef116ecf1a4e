"""What commands print: errors are coloured on a terminal only; any stdout gets its text, or an error says why not."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import IO

import pytest
from click.testing import CliRunner

from deploykit.cli import main
from deploykit.cli_parts.command import Result, deploykit_command

RED = b"\x1b[1;31m"
COMMAND = (sys.executable, "-m", "deploykit", "predict", "--model", "no/where", "hello")


def _on_a_terminal(**variables: str) -> bytes:
    """Run the command on a terminal of 40 columns. Returns its output."""
    terminal, end = pty.openpty()
    environment = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR")}
    environment |= {"TERM": "xterm", "COLUMNS": "40", **variables}
    process = subprocess.Popen(COMMAND, stdin=end, stdout=end, stderr=end, env=environment)
    os.close(end)
    shown = b""
    with contextlib.suppress(OSError):  # the other end is closed
        while part := os.read(terminal, 4096):
            shown += part
    os.close(terminal)
    assert process.wait() == 1
    return shown


def test_an_error_is_coloured_on_a_terminal_and_not_broken_into_lines() -> None:
    shown = _on_a_terminal()
    assert RED in shown
    assert b"check the path; a served model is named without slashes\r\n" in shown


def test_no_color_is_honoured() -> None:
    shown = _on_a_terminal(NO_COLOR="1")
    assert b"no/where: no such directory" in shown
    assert RED not in shown


def test_piped_output_is_plain_and_json_is_json() -> None:
    done = subprocess.run((*COMMAND, "--json"), capture_output=True, check=False)
    assert b"\x1b" not in done.stderr
    assert done.stderr.startswith(b"error: no/where: no such directory\nremedy: ")
    assert json.loads(done.stdout)["error"]["message"] == "no/where: no such directory"


_PRINTS = """
from deploykit.cli_parts.command import deploykit_command
deploykit_command()(lambda: ({"text": "é🙂"}, "é🙂"))()
"""


def _printed(*options: str, stdout: int | IO[bytes] = subprocess.PIPE) -> subprocess.CompletedProcess[bytes]:
    """Run a command that prints é🙂, with an stdout in Latin-1."""
    command = (sys.executable, "-c", _PRINTS, *options)
    environment = {**os.environ, "PYTHONIOENCODING": "latin-1"}
    return subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, check=False, env=environment)


def test_characters_that_the_encoding_of_stdout_lacks_are_escaped() -> None:
    assert _printed().stdout == b"\xe9\\U0001f642\n"
    assert json.loads(_printed("--json").stdout.decode("ascii")) == {"text": "é🙂"}


def test_a_full_disk_behind_stdout_is_an_error_without_a_traceback() -> None:
    with open("/dev/full", "wb") as full:
        done = _printed(stdout=full)
    assert done.returncode == 1
    assert done.stderr.startswith(b"error: stdout: cannot be written: no space left on its disk\nremedy: ")
    assert b"Traceback" not in done.stderr


def test_ctrl_c_before_a_command_runs_is_an_interruption(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(importlib, "import_module", interrupt)
    done = CliRunner().invoke(main, ["inspect", "x"])
    assert (done.exit_code, done.stderr) == (130, "error: interrupted\n")


def test_closed_standard_streams_give_their_numbers_to_no_file(tmp_path: Path) -> None:
    opens = "import os; open('{}', 'w').write(str(os.open('.', os.O_RDONLY)))"
    program = (
        "import subprocess, sys; from deploykit.cli import main; main(['--version'], standalone_mode=False); "
        f"{opens.format('here')}; subprocess.run([sys.executable, '-c', \"{opens.format('child')}\"], check=True)"
    )
    words = ("bash", "-c", 'exec "$0" -c "$1" <&- >&- 2>&-', sys.executable, program)
    done = subprocess.run(words, cwd=tmp_path, check=False)
    assert done.returncode == 0
    assert [int((tmp_path / name).read_text()) > 2 for name in ("here", "child")] == [True, True]


def test_a_result_for_a_closed_stdout_is_no_error() -> None:
    words = ("bash", "-c", 'exec "$0" -m deploykit doctor --json >&-', sys.executable)
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert (done.returncode, "error:" in done.stderr) == (0, False), done.stderr


def test_a_removed_working_directory_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @deploykit_command(name="where")
    def command() -> Result:
        return {}, os.getcwd()

    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    done = CliRunner().invoke(command)
    assert (done.exit_code, "the working directory was removed" in done.stderr) == (1, True)


def test_a_text_that_the_locale_has_no_letters_for_is_refused() -> None:
    """Python keeps such a text as bytes, and click replaces them."""
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    words = [sys.executable, "-m", "deploykit", "predict", "no/where", "é"]
    done = subprocess.run(words, env=environment, capture_output=True, check=False)
    assert (done.returncode, b"set LC_ALL=C.UTF-8" in done.stderr) == (2, True)
