"""The systemd unit of ``serve --print-unit``: systemd accepts it, and what it says brings a killed server back."""

from __future__ import annotations

import configparser
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil
import pytest
from served import wait_until

from deploykit.triton.preflight import take_ports
from deploykit.triton.repository import package
from deploykit.triton.service_unit import service_unit

RECOVERY_S = 5.0
SERVE = [sys.executable, "-m", "deploykit", "serve"]


def _read(unit: str) -> configparser.ConfigParser:
    found = configparser.ConfigParser(interpolation=None)
    found.optionxform = str  # type: ignore[assignment, method-assign]
    found.read_string(unit)
    return found


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is missing")
@pytest.mark.parametrize("words", [[], ["--log-file", "a b.log"], ["--limits", "max_rows=5"]], ids=str)
def test_systemd_accepts_the_unit(words: list[str], tmp_path: Path) -> None:
    path = tmp_path / "deploykit.service"
    path.write_text(service_unit(words, tmp_path, 30.0))
    done = subprocess.run(["systemd-analyze", "verify", path], capture_output=True, text=True)
    assert path.name not in done.stderr, done.stderr
    assert done.returncode == 0, done.stderr


def test_words_stay_as_they_are() -> None:
    unit = service_unit(["a b", "100%", 'say "hi"', "$HOME"], Path("/srv"), 1.0)
    assert unit.count('serve "a b" 100%% "say \\"hi\\"" $$HOME\n') == 1


def test_a_key_on_the_command_line_is_refused() -> None:
    done = subprocess.run(
        [*SERVE, "--print-unit", "--openai-port", "0", "--api-key", "k"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "--api-key-file" in done.stderr


def test_serve_starts_triton_without_importing_numpy() -> None:
    """It takes a third of the time until Triton starts. Only language models need it, for their sampling settings."""
    tasks = ("classification", "question_answering", "translation")
    modules = [f"deploykit.tasks.{task}.{name}" for task in tasks for name in ("facts", "triton_config")]
    code = f"import sys; sys.modules['numpy'] = None; import deploykit.cli.serve, deploykit.triton.server, {', '.join(modules)}"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_killed_server_is_started_again_as_the_unit_says(tiny_export: Path, tmp_path: Path) -> None:
    """systemd is not the first process where tests run, so the test does what the unit tells systemd."""
    package(tiny_export, "tiny", tmp_path / "models", engine="onnxruntime", precision="fp32")
    ports = dict(
        zip(("http", "grpc", "metrics"), take_ports("127.0.0.1", [(name, 0) for name in ("http", "grpc", "metrics")]))
    )
    words = ["--model-repository", str(tmp_path / "models"), "--ready-file", str(tmp_path / "ready.json")]
    words += [word for name, port in ports.items() for word in (f"--{name}-port", str(port))]
    printed = subprocess.run([*SERVE, *words, "--print-unit"], capture_output=True, text=True, check=True, cwd=tmp_path)
    service = _read(printed.stdout)["Service"]
    assert (service["Restart"], service["KillMode"], service["WorkingDirectory"]) == ("always", "mixed", str(tmp_path))

    temporary = tmp_path / "temporary"
    temporary.mkdir()

    def begin() -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            shlex.split(service["ExecStart"]),
            cwd=service["WorkingDirectory"],
            stderr=subprocess.DEVNULL,
            env={**os.environ, "TMPDIR": str(temporary)},
        )

    def answers() -> bool:
        try:
            return httpx.get(f"http://127.0.0.1:{ports['http']}/v2/models/tiny/ready", timeout=1.0).status_code == 200
        except httpx.HTTPError:
            return False

    def children(of: int) -> list[psutil.Process]:
        return psutil.Process(of).children(recursive=True)

    def folders() -> list[Path]:
        return list(temporary.glob("deploykit-*"))

    def regions(of: int) -> list[Path]:
        return list(Path("/dev/shm").glob(f"deploykit_{of}_*"))

    run = begin()
    try:
        assert wait_until(answers, 60)
        for _ in range(2):
            before = run.pid
            assert regions(before)
            [folder] = folders()
            family = children(run.pid)
            run.send_signal(signal.SIGKILL)
            killed = time.monotonic()
            run.wait()
            for left in family:  # KillMode=mixed
                if left.is_running():
                    left.kill()
            psutil.wait_procs(family, 5)
            time.sleep(float(service["RestartSec"]))
            run = begin()
            assert wait_until(answers, 60)
            took = time.monotonic() - killed
            seconds = [sum(process.cpu_times()[:2]) for process in [psutil.Process(run.pid), *children(run.pid)]]
            assert sum(seconds) < RECOVERY_S, "what the start takes where nothing else runs"
            assert not regions(before), "the memory that it shared with its models is free again"
            assert len(folders()) == 1
            assert not folder.exists()
            print(json.dumps({"fault": "kill -9 of serve", "seconds": round(took, 2)}))
        run.send_signal(signal.SIGTERM)
        assert run.wait(60) == 0
        assert not folders()
    finally:
        run.kill()
