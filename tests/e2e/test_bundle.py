"""A bundle on a machine that has little: no torch, no network, and ONNX Runtime in TensorRT's place."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from deploykit.artifacts import SAMPLES, load_manifest, write_manifest
from deploykit.triton.client import ServedClassifier

Deploykit = Callable[..., tuple[int, str, str]]
ENGINE = ("--engine", "onnxruntime")


@pytest.fixture(scope="module")
def archive(
    deploykit: Deploykit, make_tiny_export: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A bundle of a tiny classifier, for a JetPack with Python 3.10."""
    export = make_tiny_export(tmp_path_factory.mktemp("jetson") / "tiny")
    task = load_manifest(export).task
    shutil.copyfile(export / "model.onnx", export / "model.qdq.onnx")
    (export / SAMPLES).write_text("".join(json.dumps({"text": f"w{i} w{i * 3}"}) + "\n" for i in range(20)))
    write_manifest(export, "export", task, inputs="tiny")
    out = export.parent / "tiny-orin.tar.gz"
    code, printed, err = deploykit(
        "bundle", export, "--target", "jetson-orin-nano", "--jetpack", "6.2", "--out", out, "--json"
    )
    assert code == 0, err
    record = json.loads(printed)
    assert (record["target"], record["tensorrt"], record["precisions"]) == ("orin-nano", "10.3", ["int8"])
    assert record["size_bytes"] == out.stat().st_size
    return out


def unpacked(archive: Path, folder: Path) -> Path:
    """As a device unpacks it: tar is all it has."""
    folder.mkdir()
    subprocess.run(["tar", "-xzf", archive, "-C", folder], check=True)
    (bundle,) = folder.iterdir()
    return bundle


@pytest.fixture
def bundle(archive: Path, tmp_path: Path) -> Path:
    """Unpacked, with the engine of this environment alone: torch is not to be found from there."""
    bundle = unpacked(archive, tmp_path / "device")
    (bundle / "site").mkdir()
    for name in ("numpy", "onnxruntime", "tokenizers"):
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.origin is not None
        package = Path(spec.origin).parent
        for part in (package, package.with_name(f"{name}.libs")):
            if part.is_dir():
                (bundle / "site" / part.name).symlink_to(part)
    return bundle


def base_python() -> str:
    """This Python without its virtual environment."""
    return str(getattr(sys, "_base_executable", sys.executable))


def run(bundle: Path, *words: str, python: str | None = None) -> subprocess.CompletedProcess[str]:
    """Type ./run.sh on a machine without a network, if this one can pretend to have none."""
    alone = ["unshare", "--net", "--map-root-user"]
    if not shutil.which("unshare") or subprocess.run([*alone, "true"], capture_output=True, check=False).returncode:
        alone = []
    return subprocess.run(
        [*alone, bundle / "run.sh", *words], env=environment(python), capture_output=True, text=True, check=False
    )


def environment(python: str | None = None) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "VIRTUAL_ENV", "PYENV"))}
    return {**kept, "PYTHON": python or base_python()}


def serve_and_ask(bundle: Path, python: str | None = None) -> list[str]:
    """Start what is typed last on a device, ask it two texts, end it; returns their labels."""
    process = subprocess.Popen(
        [bundle / "run.sh", *ENGINE, "--port", "0"], env=environment(python), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert process.stdout is not None
    lines = []
    try:
        for line in process.stdout:
            lines.append(line)
            if address := re.search(r"serving tiny at (http://127\.0\.0\.1:\d+)", line):
                break
        else:
            pytest.fail("".join(lines))
        client = ServedClassifier("tiny", address[1])
        labels = [row.label for row in client.predict_rows(["w1 w2 w3", "w7"])]
        client.close()
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=30)
    assert process.returncode == 0, "a signal ends it in order"
    return labels


def test_from_an_empty_folder_to_a_served_model(bundle: Path, archive: Path) -> None:
    checked = run(bundle, "check")
    assert checked.returncode == 1
    assert "not a Jetson" in checked.stdout
    assert "error: not ready: device, TensorRT" in checked.stderr
    checked = run(bundle, "check", *ENGINE)
    assert checked.returncode == 0, checked.stderr
    assert "not a Jetson" in checked.stdout

    refused = run(bundle, "verify", *ENGINE)
    assert (refused.returncode, "is not built yet" in refused.stderr) == (1, True)
    built = run(bundle, "build", *ENGINE)
    assert built.returncode == 0, built.stderr
    verified = run(bundle, "verify", *ENGINE)
    assert "20 rows" in verified.stdout, verified.stderr
    assert "100% equal answers" in verified.stdout

    model = load_manifest(archive.parent / "tiny").task
    labels = serve_and_ask(bundle)
    assert set(labels) <= set(model.labels)  # type: ignore[union-attr]
    assert not list(bundle.rglob("*.partial"))
    no_torch = subprocess.run(
        [base_python(), "-c", "import torch"], env={**environment(), "PYTHONPATH": f"{bundle}/lib:{bundle}/site"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "No module named 'torch'" in no_torch.stderr


def test_bench_measures_there_if_psutil_is(bundle: Path) -> None:
    assert run(bundle, "build", *ENGINE).returncode == 0
    lacking = run(bundle, "bench", *ENGINE)
    assert (lacking.returncode, "psutil is not installed" in lacking.stderr) == (1, True)
    spec = importlib.util.find_spec("psutil")
    assert spec is not None
    assert spec.origin is not None
    (bundle / "site/psutil").symlink_to(Path(spec.origin).parent)
    measured = run(bundle, "bench", *ENGINE, "--seconds", "0.05")
    assert measured.returncode == 0, measured.stderr
    record = json.loads((bundle / "bench.json").read_text())
    assert record["errors"] == 0
    assert record["candidates"][0]["name"] == "tiny onnxruntime int8"


def test_nothing_runs_of_a_bundle_that_was_changed(bundle: Path) -> None:
    program = bundle / "lib/deploykit/jetson/device.py"
    program.write_text(program.read_text() + "\nraise SystemExit('this ran')\n")
    refused = run(bundle, "check", *ENGINE)
    assert refused.returncode == 1
    assert "lib/deploykit/jetson/device.py: FAILED" in refused.stdout
    assert "error: this bundle is not as it was made" in refused.stderr
    assert "this ran" not in refused.stdout + refused.stderr


def test_a_python_that_lacks_what_is_needed_is_told(archive: Path, tmp_path: Path) -> None:
    bundle = unpacked(archive, tmp_path / "device")
    refused = run(bundle, "check")
    assert refused.returncode == 1
    assert "pip install --no-deps --target site -r wheels.txt" in refused.stderr
    refused = run(bundle, "check", python="/nowhere/python3")
    assert "error: /nowhere/python3 is not Python 3.10 or newer" in refused.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("python", "jetpack"), [("3.10", "6.2"), ("3.12", "7.2")])
def test_the_pythons_of_jetpack(deploykit: Deploykit, archive: Path, tmp_path: Path, python: str, jetpack: str) -> None:
    """With the very versions that are listed for the device (this machine's builds of them)."""
    found = next(Path.home().glob(f".pyenv/versions/{python}.*/bin/python{python}"), shutil.which(f"python{python}"))
    if found is None:
        pytest.skip(f"there is no Python {python} on this machine")
    out = tmp_path / "tiny.tar.gz"
    words = ("bundle", archive.parent / "tiny", "--target", "agx-orin", "--jetpack", jetpack, "--out", out)
    code, _, err = deploykit(*words)
    assert code == 0, err
    code, _, err = deploykit("bundle", "--unpack", out, "--out", tmp_path / "device")
    assert code == 0, err
    bundle = tmp_path / "device" / "tiny-agx-orin"
    install = [found, "-m", "pip", "install", "--quiet", "--no-deps", "--target", "site", "-r", "wheels.txt"]
    subprocess.run(install, cwd=bundle, check=True, capture_output=True)
    checked = run(bundle, "check", *ENGINE, python=str(found))
    assert f"ok        Python: {python}" in checked.stdout, checked.stderr
    assert len(serve_and_ask(bundle, str(found))) == 2


def test_wrong_usage(deploykit: Deploykit, archive: Path, tmp_path: Path) -> None:
    export = archive.parent / "tiny"
    for words, code, named in (
        ((export, "--out", tmp_path / "x"), 2, "--target and --jetpack are needed"),
        ((export, "--target", "nano", "--jetpack", "6.2", "--out", tmp_path / "x"), 2, "unknown --target 'nano'"),
        ((export, "--target", "thor", "--jetpack", "6.2", "--out", tmp_path / "x"), 2, "give --jetpack 7.0 or newer"),
        ((export, "--target", "thor", "--jetpack", "7.0", "--out", archive), 1, "exists"),
        ((export, "--target", "thor", "--jetpack", "7.0", "--out", tmp_path / "x", "--public-key", "k"), 2, "--unpack"),
        (("--unpack", archive, "--out", tmp_path / "x", "--name", "n"), 2, "--unpack takes --out"),
        (("--unpack", tmp_path / "none", "--out", tmp_path / "x"), 1, "no such file"),
    ):
        got, _, err = deploykit("bundle", *words)
        assert got == code, err
        assert named in err
    assert not list(tmp_path.iterdir())
