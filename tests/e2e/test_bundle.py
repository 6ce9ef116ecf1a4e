"""A bundle on a minimal machine: no torch, no network, and ONNX Runtime instead of TensorRT."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from deploykit.artifacts import SAMPLES, load_manifest, write_manifest
from deploykit.runtime.generation import override
from deploykit.tasks.classification.served import ServedClassifier
from deploykit.tasks.opening import open_graph
from deploykit.tasks.translation.predictor import Translator
from deploykit.tasks.translation.served import ServedTranslator

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
        "bundle", export, "--device", "jetson-orin-nano", "--jetpack", "6.2", "--output", out, "--json"
    )
    assert code == 0, err
    record = json.loads(printed)
    assert (record["target"], record["tensorrt"], record["precisions"]) == ("orin-nano", "10.3", ["int8"])
    assert record["size_bytes"] == out.stat().st_size
    return out


def unpacked(archive: Path, folder: Path) -> Path:
    """Unpack it with tar, as on a device."""
    folder.mkdir()
    subprocess.run(["tar", "-xzf", archive, "-C", folder], check=True)
    (bundle,) = folder.iterdir()
    return bundle


@pytest.fixture
def bundle(archive: Path, tmp_path: Path) -> Path:
    return with_modules(unpacked(archive, tmp_path / "device"), "numpy", "onnxruntime", "tokenizers")


def with_modules(bundle: Path, *names: str) -> Path:
    """Copy only the modules ``names`` of this environment into a bundle's site folder, so that torch is missing
    there."""
    (bundle / "site").mkdir(exist_ok=True)
    for name in names:
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.origin is not None
        package = Path(spec.origin).parent
        for part in (package, package.with_name(f"{name}.libs")):
            if part.is_dir():
                (bundle / "site" / part.name).symlink_to(part)
    return bundle


def base_python() -> str:
    """Return this Python without its virtual environment."""
    return str(getattr(sys, "_base_executable", sys.executable))


def run(bundle: Path, *words: str, python: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run ./run.sh without network access, if this machine can disable it for a process."""
    alone = ["unshare", "--net", "--map-root-user"]
    if not shutil.which("unshare") or subprocess.run([*alone, "true"], capture_output=True, check=False).returncode:
        alone = []
    return subprocess.run(
        [*alone, bundle / "run.sh", *words], env=environment(python), capture_output=True, text=True, check=False
    )


def environment(python: str | None = None) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "VIRTUAL_ENV", "PYENV"))}
    return {**kept, "PYTHON": python or base_python()}


@contextlib.contextmanager
def serving(bundle: Path, python: str | None = None) -> Iterator[str]:
    """Serve a bundle and yield the printed address; end the server with a signal."""
    process = subprocess.Popen(
        [bundle / "run.sh", *ENGINE, "--port", "0"], env=environment(python), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert process.stdout is not None
    lines = []
    try:
        for line in process.stdout:
            lines.append(line)
            if address := re.search(r"serving \S+ at (http://127\.0\.0\.1:\d+)", line):
                break
        else:
            pytest.fail("".join(lines))
        yield address[1]
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=30)
    assert process.returncode == 0, "a signal ends it cleanly"


def serve_and_ask(bundle: Path, python: str | None = None) -> list[str]:
    """Return the labels of two texts from a served bundle."""
    with serving(bundle, python) as address, contextlib.closing(ServedClassifier("tiny", address)) as client:
        return [row.label for row in client.predict_rows(["w1 w2 w3", "w7"])]


def test_a_bundle_is_checked_built_verified_and_served(bundle: Path, archive: Path) -> None:
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
    assert_no_torch(bundle)


def assert_no_torch(bundle: Path) -> None:
    no_torch = subprocess.run(
        [base_python(), "-c", "import torch"], env={**environment(), "PYTHONPATH": f"{bundle}/lib:{bundle}/site"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "No module named 'torch'" in no_torch.stderr


def test_a_translators_bundle_is_built_served_and_measured(
    deploykit: Deploykit, tiny_translation_to_bundle: Path, tmp_path: Path
) -> None:
    out = tmp_path / "fr.tar.gz"
    words = ("--device", "orin-nx", "--jetpack", "6.2", "--name", "fr", "--output", out)
    code, printed, err = deploykit("bundle", tiny_translation_to_bundle, *words, "--json")
    assert code == 0, err
    record = json.loads(printed)
    assert (record["name"], record["precisions"]) == ("fr", ["int8", "fp16"])
    assert record["profile"] == "batch=1:4:16,length=1:64:128,past=1:64:128"
    bundle = with_modules(unpacked(out, tmp_path / "device"), "numpy", "onnxruntime", "tokenizers")
    lacking = run(bundle, "check", *ENGINE)
    assert (
        lacking.returncode,
        "numpy, tokenizers, sentencepiece, typing_extensions: cannot be imported" in lacking.stderr,
    ) == (1, True)
    with_modules(bundle, "sentencepiece", "psutil")
    for step, says in (
        ("check", "ok        ONNX Runtime"),
        ("build", "onnxruntime, int8"),
        ("verify", "6 rows: translations have a chrF of 100.0 against the recorded ones (100% equal)"),
    ):
        done = run(bundle, step, *ENGINE)
        assert done.returncode == 0, done.stderr
        assert says in done.stdout
    assert_no_torch(bundle)
    texts = ["Save the file.", "", "Do you want to open 3 folders?"]
    local = open_graph(tiny_translation_to_bundle, load_manifest(tiny_translation_to_bundle), engine="onnxruntime")
    assert isinstance(local, Translator)
    searches = [{}, {"beam_size": 2, "max_new_tokens": 9, "length_penalty": 0.5}]
    with serving(bundle) as address, contextlib.closing(ServedTranslator("fr", address)) as client:
        for search in searches:
            generation = override(local.task, search)
            found, expected = (one.translate(texts, generation) for one in (client, local))
            assert [dataclasses.replace(t, score=0.0) for t in found] == [
                dataclasses.replace(t, score=0.0) for t in expected
            ]
            assert [t.score for t in found] == pytest.approx([t.score for t in expected], abs=1e-5)
        infer = f"{address}/v2/models/fr/infer"
        asked = {"inputs": [{"name": "TEXT", "datatype": "BYTES", "shape": [1, 1], "data": texts[:1]}]}
        with urllib.request.urlopen(infer, json.dumps(asked).encode()) as answer:
            outputs = {output["name"]: output for output in json.load(answer)["outputs"]}
        (translated,) = local.translate(texts[:1])
        assert outputs["TRANSLATION"]["data"] == [translated.text]
        assert (outputs["TARGET_TOKENS"]["datatype"], outputs["TARGET_TOKENS"]["data"]) == (
            "INT32", [translated.target_tokens],
        )  # fmt: skip
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(infer, json.dumps({**asked, "parameters": {"beam_size": 99}}).encode())
        assert (refused.value.code, "beam_size is 99" in refused.value.read().decode()) == (400, True)
    measured = run(bundle, "bench", *ENGINE, "--seconds", "0.05")
    assert measured.returncode == 0, measured.stderr
    assert "tokens/s" in measured.stdout
    bench = json.loads((bundle / "bench.json").read_text())
    assert (bench["errors"], bench["candidates"][0]["name"]) == (0, "fr onnxruntime int8")
    assert bench["tokens_per_s"] > 0


def test_bench_runs_on_the_device_if_psutil_is_installed(bundle: Path) -> None:
    assert run(bundle, "build", *ENGINE).returncode == 0
    lacking = run(bundle, "bench", *ENGINE)
    assert (lacking.returncode, "is not installed" in lacking.stderr) == (1, True)
    with_modules(bundle, "psutil")
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
    assert "error: a file of this bundle is missing or was changed" in refused.stderr
    assert "this ran" not in refused.stdout + refused.stderr


def test_missing_python_or_modules_are_named(archive: Path, tmp_path: Path) -> None:
    bundle = unpacked(archive, tmp_path / "device")
    refused = run(bundle, "check")
    assert refused.returncode == 1
    assert "pip install --no-deps --target site -r wheels.txt" in refused.stderr
    refused = run(bundle, "check", python="/nowhere/python3")
    assert "error: /nowhere/python3 is not Python 3.10 or newer" in refused.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("python", "jetpack"), [("3.10", "6.2"), ("3.12", "7.2")])
def test_the_pythons_of_jetpack(deploykit: Deploykit, archive: Path, tmp_path: Path, python: str, jetpack: str) -> None:
    """Run with the package versions listed for the device, in this machine's builds."""
    found = next(Path.home().glob(f".pyenv/versions/{python}.*/bin/python{python}"), shutil.which(f"python{python}"))
    if found is None:
        pytest.skip(f"there is no Python {python} on this machine")
    out = tmp_path / "tiny.tar.gz"
    words = ("bundle", archive.parent / "tiny", "--device", "agx-orin", "--jetpack", jetpack, "--output", out)
    code, _, err = deploykit(*words)
    assert code == 0, err
    code, _, err = deploykit("unpack", out, "--output-dir", tmp_path / "device")
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
        ((export, "--output", tmp_path / "x"), 2, "--device and --jetpack are required"),
        ((export, "--device", "nano", "--jetpack", "6.2", "--output", tmp_path / "x"), 2, "unknown --device 'nano'"),
        (
            (export, "--device", "thor", "--jetpack", "6.2", "--output", tmp_path / "x"),
            2,
            "give --jetpack 7.0 or newer",
        ),
        ((export, "--device", "thor", "--jetpack", "7.0", "--output", archive), 1, "exists"),
        (
            (export, "--device", "thor", "--jetpack", "7.0", "--output", tmp_path / "x", "--public-key", "k"),
            2,
            "deploykit unpack",
        ),
        (("--unpack", archive, "--output", tmp_path / "x", "--name", "n"), 2, "--unpack takes only --out"),
        (("--unpack", tmp_path / "none", "--output", tmp_path / "x"), 1, "no such file"),
    ):
        got, _, err = deploykit("bundle", *words)
        assert got == code, err
        assert named in err
    assert not list(tmp_path.iterdir())
