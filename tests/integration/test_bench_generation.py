"""bench/generation.py from end to end, on a model so small that it takes seconds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from language_models import write_checkpoint
from paths import ROOT

from deploykit.tasks.text_generation.chat_template import CHATML

NAMES = ["deploykit native int8", "deploykit int8", "deploykit fp32", "transformers fp32"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint, and the forms that the scripts make of it."""
    folder = tmp_path_factory.mktemp("generation")
    write_checkpoint(folder / "checkpoint", "llama", CHATML)
    return folder


def run(script: str, folder: Path, *words: str) -> tuple[int, dict[str, Any]]:
    out = folder / f"{script}.json"
    command = [sys.executable, str(ROOT / "bench" / script), "--checkpoint", str(folder / "checkpoint"),
               "--folder", str(folder / script), "--out", str(out), *words]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GENERATION_VENV": str(folder / "nowhere")}
    done = subprocess.run(command, env=environment, check=False, capture_output=True, text=True)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, json.loads(out.read_text(encoding="utf-8"))


def test_contenders_and_streaming_clients_are_measured(folder: Path) -> None:
    code, suite = run("generation.py", folder, "--quick", "--threads", "1", "--contenders", *NAMES, "llama.cpp q8_0")
    assert code == 0
    assert list(suite["skipped"]) == ["llama.cpp q8_0"]
    process, served = suite["workloads"]
    assert [c["name"] for c in process["contenders"]] == NAMES
    for contender in process["contenders"]:
        assert set(contender["decode_tokens_per_s"]) == {"1", "2"}
        assert contender["prefill_tokens_per_s"]["median"] > 0
        assert contender["size_mb"] > 0.1
        assert contender["peak_memory_mb"] > 10
    assert process["contenders"][2]["tokens_as_base"] == 1.0
    assert [(load["precision"], load["clients"]) for load in served["loads"]] == [
        ("int8", 1), ("fp32", 1), ("int8", 2), ("fp32", 2)
    ]  # fmt: skip
    assert all(load["tokens"] == 6 * load["requests"] for load in served["loads"])
