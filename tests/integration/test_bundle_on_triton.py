"""A bundle on a device with Triton: here the embedded one in the layout of NVIDIA's containers."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from served import wait_until

from deploykit.artifacts import SAMPLES, load_manifest, write_manifest
from deploykit.errors import ServerError
from deploykit.jetson.bundle import bundle, unpack
from deploykit.tasks.classification.served import ServedClassifier
from deploykit.tasks.opening import open_served
from deploykit.tasks.translation.served import ServedTranslator
from deploykit.triton.preflight import find_triton, take_ports


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """The folder with the programs of an installed Triton."""
    triton, prefix = find_triton(), tmp_path / "tritonserver"
    shutil.copytree(triton.binary.parent, prefix / "bin")
    shutil.copytree(triton.python_backend, prefix / "backends" / "python")
    shutil.copy(triton.stub, prefix / "backends" / "python")
    return prefix / "bin"


@contextmanager
def served(export: Path, name: str, installed: Path, tmp_path: Path) -> Iterator[str]:
    """Bundle, unpack and serve ``export`` as ``name`` with the installed Triton. Yields the address."""
    bundle(export, tmp_path / "a.tgz", "agx-orin", "6.2", name=name, say=lambda line: None)
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
            assert wait_until(lambda: answers(name, port) or process.poll() is not None, 60)
            assert process.poll() is None, (tmp_path / "log").read_text()
            yield f"http://127.0.0.1:{port}"
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(45)
            finally:
                process.kill()
    assert "with " + str(installed / "tritonserver") in (tmp_path / "log").read_text()


def test_a_bundle_is_served_by_the_installed_triton(
    installed: Path, make_tiny_export: Callable[..., Path], tmp_path: Path
) -> None:
    export = make_tiny_export(tmp_path / "tiny")
    shutil.copyfile(export / "model.onnx", export / "model.qdq.onnx")
    (export / SAMPLES).write_text(json.dumps({"text": "w1 w2"}) + "\n")
    write_manifest(export, "export", load_manifest(export).task, inputs="tiny")
    with served(export, "tiny", installed, tmp_path) as url, closing(ServedClassifier("tiny", url)) as client:
        labels = [row.label for row in client.predict_rows(["w1", "w2 w3"])]
    assert set(labels) <= {"negative", "neutral", "positive"}


def test_a_translators_bundle_streams_by_triton(
    installed: Path, tiny_translation_to_bundle: Path, tmp_path: Path
) -> None:
    with served(tiny_translation_to_bundle, "fr", installed, tmp_path) as url:
        with closing(ServedTranslator("fr", url)) as client:
            sentences = [t.text for t in client.translate(["Save the file. ", "Close it."])]
        request = json.dumps({"TEXT": "Save the file. Close it."}).encode()
        with urllib.request.urlopen(f"{url}/v2/models/fr_stream/generate_stream", request) as answer:
            events = [json.loads(line[6:]) for line in answer.read().decode().splitlines() if line.startswith("data: ")]
    assert [event["TRANSLATION"].strip() for event in events] == [sentence.strip() for sentence in sentences]


def answers(name: str, port: int) -> bool:
    try:
        open_served(name, f"http://127.0.0.1:{port}").close()
    except ServerError:
        return False
    return True
