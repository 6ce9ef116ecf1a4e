"""A bundle on a device that has Triton: here the embedded one, laid out as NVIDIA's containers lay it out."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from served import wait_until

from deploykit.artifacts import SAMPLES, load_manifest, write_manifest
from deploykit.errors import ServerError
from deploykit.jetson.bundle import bundle, unpack
from deploykit.triton.client import ServedClassifier
from deploykit.triton.preflight import find_triton, take_ports


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """The folder of programs of an installed Triton."""
    triton, prefix = find_triton(), tmp_path / "tritonserver"
    shutil.copytree(triton.binary.parent, prefix / "bin")
    shutil.copytree(triton.python_backend, prefix / "backends" / "python")
    shutil.copy(triton.stub, prefix / "backends" / "python")
    return prefix / "bin"


def test_a_bundle_is_served_by_the_triton_that_is_there(
    installed: Path, make_tiny_export: Callable[..., Path], tmp_path: Path
) -> None:
    export = make_tiny_export(tmp_path / "tiny")
    shutil.copyfile(export / "model.onnx", export / "model.qdq.onnx")
    (export / SAMPLES).write_text(json.dumps({"text": "w1 w2"}) + "\n")
    write_manifest(export, "export", load_manifest(export).task, inputs="tiny")
    bundle(export, tmp_path / "a.tgz", "agx-orin", "6.2", say=lambda line: None)
    device = unpack(tmp_path / "a.tgz", tmp_path / "device")
    python = Path(sys.executable)
    environment = {
        **os.environ,
        "PATH": f"{python.parent}:{installed}:{os.environ['PATH']}",  # the stub runs the first python3
        "LD_LIBRARY_PATH": find_triton().library_path,
        "PYTHON": str(python),
    }
    (port,) = take_ports("127.0.0.1", [("http", 0)])
    words = [device / "run.sh", "--engine", "onnxruntime", "--port", str(port)]
    with (
        (tmp_path / "log").open("w") as log,
        subprocess.Popen(words, env=environment, stdout=log, stderr=log) as process,
    ):
        try:
            assert wait_until(lambda: answers(port) or process.poll() is not None, 60)
            assert process.poll() is None, (tmp_path / "log").read_text()
            client = ServedClassifier("tiny", f"http://127.0.0.1:{port}")
            labels = [row.label for row in client.predict_rows(["w1", "w2 w3"])]
            client.close()
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(45)
            finally:
                process.kill()
    assert set(labels) <= {"negative", "neutral", "positive"}
    assert "by " + str(installed / "tritonserver") in (tmp_path / "log").read_text()


def answers(port: int) -> bool:
    try:
        ServedClassifier("tiny", f"http://127.0.0.1:{port}", patience=0).close()
    except ServerError:
        return False
    return True
