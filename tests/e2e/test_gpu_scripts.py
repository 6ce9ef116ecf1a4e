"""The scripts of bench/gpu run with the CPU as device."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from language_models import write_checkpoint, write_rows
from paths import ROOT

from deploykit.tasks.text_generation.chat_template import CHATML

SCRIPTS = ROOT / "bench" / "gpu"
NEEDS_NO_PYTEST = ["doctor", "finetune", "classify", "translate", "answer", "generate", "export", "tensorrt"]


@pytest.mark.slow
def test_every_step_runs_on_the_cpu_and_is_recorded(minilm: Path, tweets: Path, pairs: Path, tmp_path: Path) -> None:
    payload, out = tmp_path / "payload", tmp_path / "out"
    (payload / "tweets").mkdir(parents=True)
    (payload / "tweets" / tweets.name).symlink_to(tweets)
    (payload / "minilm").symlink_to(minilm)
    (payload / "pairs.tsv").symlink_to(pairs)
    write_checkpoint(payload / "smollm2", template=CHATML)
    write_rows(payload / "commands.jsonl")
    steps = [word for step in NEEDS_NO_PYTEST for word in ("--step", step)]
    run(SCRIPTS / "run.sh", "cpu", payload, out, "--quick", *steps)
    record = json.loads((out / "gpu.json").read_text())
    assert {name: step["status"] for name, step in record["steps"].items()} == dict.fromkeys(NEEDS_NO_PYTEST, "ok")
    results = {name: step["result"] for name, step in record["steps"].items()}
    assert results["classify"]["onnxruntime"]["same answer"] == 1.0
    assert results["classify"]["onnxruntime"]["largest difference of a logit"] < 1e-4
    assert results["finetune"]["classifier fp32 on cpu"]["train_loss"] > 0
    assert results["translate"]["torch generate, 4 rows"]["tokens per second"] > 0
    assert results["answer"]["answerer fp32 on cpu"]["train_samples_per_second"] > 0
    assert results["answer"]["onnxruntime"]["same span as the CPU's"] == 1.0
    assert results["generate"]["language model fp32 on cpu"]["tokens_per_second"] > 0
    assert results["generate"]["torch eager float32, 4 rows"]["prefill tokens per second"] > 0
    assert results["export"]["equal"] is True
    assert results["tensorrt"]["graph_bytes"] > 1_000_000
    assert record["device"] == "cpu"
    assert record["card"]


def test_a_step_that_does_not_end_is_stopped_and_recorded(tmp_path: Path) -> None:
    shutil.copy(SCRIPTS / "run.py", tmp_path)
    (tmp_path / "steps.py").write_text("import time\ntime.sleep(600)\n")
    program = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import run; run.STEPS = {{'doctor': 0.01}}\n"
        f"sys.argv = ['run.py', '--device', 'cpu', '--payload', '.', '--out', {str(tmp_path)!r}]; run.main()"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert json.loads((tmp_path / "gpu.json").read_text())["steps"]["doctor"]["status"] == "timed out"


def test_the_tests_for_a_gpu_are_collected_without_tensorrt() -> None:
    program = (
        "import sys; sys.modules['tensorrt_rtx'] = None; import pytest; "
        "sys.exit(pytest.main(['-m', 'gpu', '-q', '--collect-only', '-p', 'no:cacheprovider', *sys.argv[1:]]))"
    )
    files = [
        str(path) for path in (ROOT / "tests").rglob("test_*.py") if "mark.gpu" in path.read_text(encoding="utf-8")
    ]
    done = subprocess.run(
        [sys.executable, "-c", program, *files], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "test_onnxruntime_cuda.py" in done.stdout


def test_all_steps_together_end_within_six_minutes() -> None:
    program = f"import sys; sys.path.insert(0, {str(SCRIPTS)!r}); import run; print(sum(run.STEPS.values()))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(done.stdout) <= 350


@pytest.fixture
def parts(tmp_path: Path) -> Path:
    """Files as prepare.sh writes them, with a small wheel: two parts and their digests."""
    wheel = tmp_path / "small-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("small.py", "answer = 42\n")
        archive.writestr("small-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: small\nVersion: 1.0\n")
        tags = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        archive.writestr("small-1.0.dist-info/WHEEL", tags)
        archive.writestr("small-1.0.dist-info/RECORD", "")
    with tarfile.open(tmp_path / "all.tar", "w") as tar:
        tar.add(wheel, f"wheels/{wheel.name}")
    data = (tmp_path / "all.tar").read_bytes()
    folder = tmp_path / "parts"
    folder.mkdir()
    for number, piece in enumerate((data[:4096], data[4096:])):
        (folder / f"part-{number:02}").write_bytes(piece)
    digests = (f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in sorted(folder.iterdir()))
    (folder / "SHA256SUMS").write_text("".join(list(digests)))
    return folder


def test_parts_are_joined_and_their_wheels_installed(parts: Path, tmp_path: Path) -> None:
    run(SCRIPTS / "unpack.sh", parts, tmp_path / "dest")
    assert (tmp_path / "dest" / "site" / "small.py").read_text() == "answer = 42\n"


def test_a_damaged_part_is_named_and_nothing_is_installed(parts: Path, tmp_path: Path) -> None:
    (parts / "part-01").write_bytes(b"damaged")
    done = subprocess.run(
        [SCRIPTS / "unpack.sh", parts, tmp_path / "dest"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "part-01" in done.stderr
    assert "carry them again" in done.stderr
    assert not (tmp_path / "dest").exists()


def run(*words: object) -> None:
    environment = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run(
        list(map(str, words)), env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:]
