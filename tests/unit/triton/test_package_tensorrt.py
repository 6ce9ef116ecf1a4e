"""TensorRT engines in a model repository, and the container that serves them."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import yaml
from click.testing import CliRunner
from fake_gpu import FakeDriver, fake_bindings, install_bindings, install_driver, write_engine

from deploykit.artifacts import load_manifest, write_manifest
from deploykit.cli import main
from deploykit.errors import ArtifactError, MissingDependencyError
from deploykit.runtime.serving_settings import ServingSettings
from deploykit.tasks.opening import open_classifier
from deploykit.tensorrt.options import parse_profile
from deploykit.triton.preflight import find_triton
from deploykit.triton.repository import COMPOSE, config_text, package, read_config
from deploykit.triton.server import TritonServer

DOCKERFILE = (COMPOSE.parent / "Dockerfile").read_text(encoding="utf-8")
TEXTS = ["w1 w2", "w3 " * 40, "w5"]


@pytest.fixture
def export(tiny_export: Path, tmp_path: Path) -> Path:
    """An export with an fp32 engine for the fake GPU, and a listed one whose file is missing."""
    folder = tmp_path / "export"
    shutil.copytree(tiny_export, folder)
    profile = parse_profile("batch=1:8:32,length=16:64:64")
    record = write_engine(folder / "model.engine", folder / "model.onnx", [profile], "tensorrt", "10.13.3", "sm_86")
    engines = [{"file": "gone.engine", "precision": "int8"}, {"file": record.file, "precision": record.precision}]
    task = load_manifest(folder, verify=False).task
    write_manifest(folder, "export", task, inputs="x", metrics={"engines": engines})
    return folder


def test_an_engine_is_packaged_without_a_gpu_and_answers_on_one(
    export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = (
        "package",
        export,
        "--name",
        "tweets",
        "--engine",
        "tensorrt",
        "--model-repository",
        tmp_path / "my models",
        "--json",
    )
    result = CliRunner().invoke(main, [str(word) for word in words])
    assert result.exit_code == 0, result.stderr
    record = json.loads(result.stdout)
    assert (record["engine"], record["precision"]) == ("tensorrt", "fp32")
    assert record["container"] == (
        f"ENGINE=tensorrt==10.13.3 MODELS='{tmp_path}/my models' docker compose -f {COMPOSE} up --build --detach"
    )
    version = Path(record["path"])
    assert set(load_manifest(version).files) == {"model.engine", "model.json", "tokenizer.json"}
    config = read_config(version.parent / "config.pbtxt")  # parsed by Triton's own schema
    assert config.backend == "deploykit"
    assert [(group.kind, group.count) for group in config.instance_group] == [(config.instance_group[0].KIND_GPU, 2)]

    with pytest.raises(MissingDependencyError, match="engine tensorrt needs an NVIDIA GPU"):
        open_classifier(str(version), url="")
    driver = FakeDriver(devices=2)
    install_driver(monkeypatch, driver)
    install_bindings(monkeypatch, "tensorrt", fake_bindings(driver, "tensorrt", "10.13.3"))
    expected = open_classifier(str(export), url="", engine="onnxruntime", precision="fp32").scores(TEXTS)
    np.testing.assert_array_equal(open_classifier(str(version), url="").scores(TEXTS), expected)


def test_the_config_differs_from_the_cpus_only_in_the_device(export: Path, tmp_path: Path) -> None:
    task, settings = load_manifest(export).task, ServingSettings()
    on_gpu, on_cpu = (config_text(task, settings, engine=engine) for engine in ("tensorrt", "onnxruntime"))
    assert on_gpu != on_cpu
    assert on_gpu.replace("KIND_GPU count", "KIND_CPU count") == on_cpu


def test_a_config_for_the_other_kind_of_engine_is_refused(export: Path, tmp_path: Path) -> None:
    package(export, "tweets", tmp_path, engine="onnxruntime", precision="fp32")
    with pytest.raises(
        ArtifactError, match="instance_group has KIND_CPU, the engine tensorrt runs on KIND_GPU"
    ) as refused:
        package(export, "tweets", tmp_path, engine="tensorrt")
    assert "--overwrite-config" in str(refused.value.remedy)
    assert package(export, "tweets", tmp_path, engine="tensorrt", overwrite_config=True).version == 2


def test_serving_an_engine_without_a_gpu_is_refused_before_triton_starts(export: Path, tmp_path: Path) -> None:
    package(export, "tweets", tmp_path / "models", engine="tensorrt")
    with pytest.raises(MissingDependencyError, match="needs an NVIDIA GPU"):
        TritonServer(tmp_path / "models", http_port=0, grpc_port=0, metrics_port=0).start()


def test_the_compose_file_restricts_the_container() -> None:
    service = yaml.safe_load(COMPOSE.read_text(encoding="utf-8"))["services"]["triton"]
    assert service["user"] == "1000:1000"
    assert all(port.startswith("127.0.0.1:") for port in service["ports"])
    assert service["volumes"][0].endswith(":/models:ro")
    assert (service["read_only"], service["cap_drop"]) == (True, ["ALL"])
    assert "no-new-privileges:true" in service["security_opt"]
    (gpu,) = service["deploy"]["resources"]["reservations"]["devices"]
    assert (gpu["driver"], gpu["capabilities"]) == ("nvidia", ["gpu"])
    context = COMPOSE.parent / service["build"]["context"]
    assert (context / service["build"]["dockerfile"]).read_text(encoding="utf-8") == DOCKERFILE
    assert set(service["build"]["args"]) == set(re.findall(r"^ARG (\w+)", DOCKERFILE, re.MULTILINE))
    for source in re.findall(r"^COPY (\S+) ", DOCKERFILE, re.MULTILINE):
        assert (context / source).exists(), source


def test_the_image_is_recent_and_runs_without_root() -> None:
    default = re.search(r"^ARG TRITON=(\d+)\.(\d+)$", DOCKERFILE, re.MULTILINE)
    assert default is not None
    assert (int(default[1]), int(default[2])) >= (26, 6)
    assert "\nUSER 1000:1000\n" in DOCKERFILE
    assert "--model-control-mode=none" in DOCKERFILE
    (health,) = re.findall(r'CMD \["python3", "/opt/deploykit/([^"]+)", "/models"\]', DOCKERFILE)
    assert (COMPOSE.parents[3] / health).is_file()


def test_triton_knows_every_option_in_the_image() -> None:
    triton = find_triton()
    done = subprocess.run(
        [triton.binary, "--help"],
        env={"LD_LIBRARY_PATH": triton.library_path},
        capture_output=True,
        text=True,
        check=False,
    )
    known = set(re.findall(r"--[a-z][a-z-]+", done.stdout + done.stderr))
    given = set(re.findall(r"--[a-z][a-z-]+(?==| )", DOCKERFILE.split("exec tritonserver")[1]))
    assert len(given) == 6
    assert given <= known
