"""A command whose disk is full says so, names the file or folder, and leaves nothing that looks whole."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

ROOM = 6000
"""Bytes that a file may have: the operating system refuses the rest, as it does on a full disk."""


def run(*words: object, room: int = ROOM) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "deploykit", *map(str, words)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        preexec_fn=partial(resource.setrlimit, resource.RLIMIT_FSIZE, (room, room)),
    )


@pytest.fixture(scope="module")
def checkpoint(make_tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_checkpoint(tmp_path_factory.mktemp("made") / "checkpoint")


def command(name: str, checkpoint: Path, export: Path, rows: Path, out: Path) -> list[object]:
    return {
        "finetune": ["finetune", "--model", checkpoint, "--train", rows, "--output-dir", out, "--max-steps", 1],
        "export": ["export", checkpoint, "--data", rows, "--output-dir", out],
        "calibrate": ["calibrate", checkpoint, "--calibration-data", rows, "--output-dir", out],
        "package": ["package", export, "--name", "tiny", "--model-repository", out],
        "predict": ["predict", export, "--input", rows, "--output", out],
        "bench": [
            "bench",
            export,
            "--data",
            rows,
            "--rounds",
            1,
            "--seconds",
            0.1,
            "--num-prompts",
            20,
            "--output",
            out,
        ],
    }[name]


@pytest.mark.parametrize("name", ["finetune", "export", "calibrate", "package", "predict", "bench"])
def test_a_command_that_cannot_write_says_so_and_leaves_nothing_whole(
    name: str, checkpoint: Path, tiny_export: Path, rows: Path, tmp_path: Path
) -> None:
    out = tmp_path / {"predict": "out.csv", "bench": "out.json"}.get(name, "out")
    failed = run(*command(name, checkpoint, tiny_export, rows, out))
    assert failed.returncode == 1, failed.stderr
    assert "cannot be written: it would be larger than" in failed.stderr
    assert "remedy: write to another disk" in failed.stderr
    assert "Traceback" not in failed.stderr
    assert not list(tmp_path.rglob("manifest.json"))
    assert out.exists() == (name == "package"), "the folder of the repository, with no version in it"


def test_the_earlier_answers_stay_and_the_next_run_goes_on(tiny_export: Path, rows: Path, tmp_path: Path) -> None:
    out = tmp_path / "answers.csv"
    words = command("predict", tiny_export, tiny_export, rows, out)
    out.write_text("mine\n")
    assert run(*words, "--force").returncode == 1
    assert out.read_text() == "mine\n"
    done = run(*words, "--force", room=10**7)
    assert done.returncode == 0, done.stderr
    assert len(out.read_text().splitlines()) == 601


@pytest.mark.parametrize("room", [0, 20_000, 200_000], ids=["nothing", "guard", "backend"])
def test_serve_that_cannot_write_its_temporary_files_says_so(
    room: int, tiny_export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models, temporary = tmp_path / "models", tmp_path / "temporary"
    temporary.mkdir()
    assert run("package", tiny_export, "--name", "tiny", "--model-repository", models, room=10**7).returncode == 0
    monkeypatch.setenv("TMPDIR", str(temporary))
    ports = [word for name in ("http", "grpc", "metrics") for word in (f"--{name}-port", 0)]
    failed = run("serve", "--model-repository", models, *ports, room=room)
    assert failed.returncode == 1, failed.stderr
    assert "written" in failed.stderr
    assert "remedy: " in failed.stderr
    assert "--debug" not in failed.stderr
    assert not list(temporary.glob("deploykit-*"))
