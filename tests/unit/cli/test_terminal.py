"""Errors are coloured on a terminal, and plain if piped or NO_COLOR is set."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import subprocess
import sys

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
