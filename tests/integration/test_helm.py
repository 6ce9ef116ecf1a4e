"""Helm itself renders the chart that ``package --kubernetes`` writes."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploykit.triton.kubernetes import write_kubernetes

HELM = Path(os.environ.get("HELM_FOLDER", "/tmp/deploykit-helm")) / "helm"
WITHOUT_SCHEMA = ("ServiceMonitor", "PrometheusRule")
pytestmark = pytest.mark.skipif(not HELM.is_file(), reason=f"{HELM} is missing: make interop fetches it")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kubernetes")
    write_kubernetes("tweets", folder, gpus=1)
    return folder


def helm(*words: object) -> str:
    return subprocess.run([HELM, *map(str, words)], check=True, capture_output=True, text=True).stdout


def rendered(folder: Path, *words: str, name: str = "tweets") -> dict[str, Any]:
    found = yaml.safe_load_all(helm("template", name, folder / "chart", *words))
    return {each["kind"]: each for each in found}


def test_the_chart_has_no_fault(folder: Path) -> None:
    assert "0 chart(s) failed" in helm("lint", "--strict", folder / "chart")


def test_the_rendered_chart_is_the_manifests_and_fits_the_schemas(folder: Path) -> None:
    validate = pytest.importorskip("kubernetes_validate")
    left_out = ("kustomization", "prometheus-adapter")
    plain = [yaml.safe_load(path.read_text()) for path in folder.glob("*.yaml") if path.stem not in left_out]
    found = rendered(folder)
    assert found == {each["kind"]: each for each in plain}
    for kind, each in found.items():
        if kind not in WITHOUT_SCHEMA:
            validate.validate(each, validate.latest_version(), strict=True)


def test_names_and_values_reach_every_resource(folder: Path) -> None:
    validate = pytest.importorskip("kubernetes_validate")
    chosen = (
        "image=registry.example/a:1",
        "claim=mine",
        "gpus=0",
        "cpu=4",
        "memory=8Gi",
        "minReplicas=3",
        "maxReplicas=9",
        "queueUs=500",
    )
    found = rendered(folder, *(word for one in chosen for word in ("--set", one)), name="other")
    assert all(each["metadata"]["name"].startswith("other") for each in found.values())
    pod = found["Deployment"]["spec"]["template"]["spec"]
    [container] = pod["containers"]
    assert container["image"] == "registry.example/a:1"
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 0
    assert container["resources"]["limits"]["memory"] == "8Gi"
    assert {"claimName": "mine"}.items() <= next(
        v["persistentVolumeClaim"] for v in pod["volumes"] if "persistentVolumeClaim" in v
    ).items()
    scaler = found["HorizontalPodAutoscaler"]["spec"]
    assert (scaler["minReplicas"], scaler["maxReplicas"], scaler["scaleTargetRef"]["name"]) == (3, 9, "other")
    for kind, each in found.items():
        if kind not in WITHOUT_SCHEMA:
            validate.validate(each, validate.latest_version(), strict=True)


@pytest.mark.parametrize("source", ["image", "bucket"])
def test_models_come_from_an_image_or_a_bucket(folder: Path, source: str) -> None:
    validate = pytest.importorskip("kubernetes_validate")
    given = folder / f"chart/models-from-{source}.yaml"
    values = yaml.safe_load(given.read_text())
    found = rendered(folder, "-f", str(given))
    pod = found["Deployment"]["spec"]["template"]["spec"]
    assert {"name": "models", **values["volume"]} in pod["volumes"]
    assert pod["initContainers"] == values.get("initContainers", [])
    assert found["NetworkPolicy"]["spec"]["egress"] == values.get("egress", [])
    for kind in ("Deployment", "NetworkPolicy"):
        validate.validate(found[kind], validate.latest_version(), strict=True)
