from __future__ import annotations

import errno
import importlib
import os
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import deploykit.locks

HOLD = """
import sys
from deploykit.locks import lock
file = open(sys.argv[1], "a+b")
print(lock(file.fileno(), wait=False), flush=True)
sys.stdin.read()
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "rows.jsonl"


def test_a_lock_is_held_until_the_process_ends(path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdin=-1, stdout=-1, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "True\n"
        with path.open("a+b") as file:
            assert not deploykit.locks.lock(file.fileno(), wait=False)
            holder.kill()
            assert deploykit.locks.lock(file.fileno(), wait=True)


@pytest.fixture
def on_windows(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int, bool], bool]]:
    """``lock`` with msvcrt, whose locks are those of places in files."""
    held: dict[tuple[int, int], int] = {}

    def locking(descriptor: int, mode: int, count: int) -> None:
        assert (mode, count) == (2, 1)
        place = os.fstat(descriptor).st_ino, os.lseek(descriptor, 0, os.SEEK_CUR)
        if held.setdefault(place, descriptor) != descriptor:
            raise OSError(errno.EACCES, "Permission denied")

    monkeypatch.setitem(sys.modules, "fcntl", None)
    monkeypatch.setitem(sys.modules, "msvcrt", types.SimpleNamespace(LK_NBLCK=2, locking=locking))
    module = importlib.reload(deploykit.locks)
    yield lambda descriptor, wait: module.lock(descriptor, wait=wait)
    monkeypatch.undo()
    importlib.reload(deploykit.locks)


def test_on_windows_a_byte_behind_the_content_is_locked(path: Path, on_windows: Callable[[int, bool], bool]) -> None:
    with path.open("a+b") as first, path.open("a+b") as second:
        first.write(b"one\n")
        first.flush()
        assert on_windows(first.fileno(), False)
        assert not on_windows(second.fileno(), False)
        assert first.tell() == 4
        first.write(b"two\n")
    assert path.read_bytes() == b"one\ntwo\n"


def test_the_steps_that_lock_import_without_fcntl() -> None:
    code = "import sys, errno, subprocess, multiprocessing.util; "  # these look for msvcrt
    code += "sys.modules['fcntl'] = None; sys.modules['msvcrt'] = errno; import deploykit.data.answer_file, deploykit.stages.finetune, deploykit.cli.predict"
    subprocess.run([sys.executable, "-c", code], check=True)
