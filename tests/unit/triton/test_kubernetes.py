"""The Kubernetes files parse, keep to safe settings, and agree with the Helm chart."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploykit.triton.kubernetes import write_kubernetes
from deploykit.triton.monitoring import ALERTS, DASHBOARD


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_kubernetes("tweets", tmp_path, gpus=1)
    return tmp_path


def _load(path: Path) -> dict[str, Any]:
    found = yaml.safe_load(path.read_text())
    assert isinstance(found, dict)
    return found


def test_every_manifest_of_the_kustomization_is_there(folder: Path) -> None:
    listed = _load(folder / "kustomization.yaml")["resources"]
    kinds = {_load(folder / name)["kind"] for name in listed}
    assert kinds == {
        "Deployment", "Service", "HorizontalPodAutoscaler", "PodDisruptionBudget", "NetworkPolicy", "ServiceMonitor",
        "PrometheusRule", "ConfigMap",
    }  # fmt: skip


def test_pods_are_locked_down_and_drain(folder: Path) -> None:
    pod = _load(folder / "deployment.yaml")["spec"]["template"]["spec"]
    [container] = pod["containers"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 1
    pause = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod["terminationGracePeriodSeconds"] > pause + 30
    for probe in ("readinessProbe", "livenessProbe"):
        assert "health.py" in container[probe]["exec"]["command"][1]
    mounts = {mount["name"] for mount in container["volumeMounts"]}
    assert mounts == {volume["name"] for volume in pod["volumes"]}


def _rendered(folder: Path, name: str, values: dict[str, Any]) -> Any:
    """Return a template of the chart with ``values``, as Helm renders it."""
    volume = values["volume"] or {"persistentVolumeClaim": {"claimName": values["claim"], "readOnly": True}}
    dashboard = (folder / "chart/dashboard.json").read_text().strip()
    text = (folder / "chart/templates" / name).read_text().replace("{{ .Release.Name }}", "tweets")
    text = text.replace('{{ .Files.Get "dashboard.json" | nindent 4 | trim }}', dashboard.replace("\n", "\n    "))
    text = re.sub(r"\{\{ \.Values\.volume \| .*? \}\}", json.dumps(volume)[1:-1], text)
    text = re.sub(r"\{\{ toJson \.Values\.(\w+) \}\}", lambda found: json.dumps(values[found[1]]), text)
    return yaml.safe_load(re.sub(r"\{\{ \.Values\.(\w+) \}\}", lambda found: str(values[found[1]]), text))


def test_the_chart_with_its_own_values_is_the_manifests(folder: Path) -> None:
    values = _load(folder / "chart/values.yaml")
    for template in (folder / "chart/templates").iterdir():
        assert _rendered(folder, template.name, values) == _load(folder / template.name)


@pytest.mark.parametrize(("source", "volume"), [("image", "image"), ("bucket", "emptyDir")])
def test_the_chart_takes_models_from_an_image_or_a_bucket(folder: Path, source: str, volume: str) -> None:
    validate = pytest.importorskip("kubernetes_validate")
    values = _load(folder / "chart/values.yaml") | _load(folder / f"chart/models-from-{source}.yaml")
    pod = _rendered(folder, "deployment.yaml", values)
    for found in (pod, _rendered(folder, "network-policy.yaml", values)):
        validate.validate(found, validate.latest_version(), strict=True)
    spec = pod["spec"]["template"]["spec"]
    models = next(each for each in spec["volumes"] if each["name"] == "models")
    assert set(models) == {"name", volume}
    mounts = [mount for init in spec["initContainers"] for mount in init["volumeMounts"]]
    assert {mount["name"] for mount in mounts} <= {each["name"] for each in spec["volumes"]}
    assert [mount["mountPath"] for mount in mounts if mount["name"] == "models"] == ["/models"] * (source == "bucket")


def test_the_manifests_fit_the_schemas(folder: Path) -> None:
    validate = pytest.importorskip("kubernetes_validate")
    for path in folder.glob("*.yaml"):
        if path.stem not in ("kustomization", "service-monitor", "alerts", "prometheus-adapter"):
            validate.validate(_load(path), validate.latest_version(), strict=True)


def test_the_adapter_gives_the_autoscaler_its_metric(folder: Path) -> None:
    [rule] = _load(folder / "prometheus-adapter.yaml")["rules"]["custom"]
    asked = [
        each["pods"]["metric"]["name"]
        for each in _load(folder / "autoscaler.yaml")["spec"]["metrics"]
        if "pods" in each
    ]
    assert asked == [rule["name"]["as"]]
    assert set(rule["resources"]["overrides"]) == {"namespace", "pod"}


def test_the_dashboard_and_the_rules_are_those_of_the_package(folder: Path) -> None:
    assert _load(folder / "alerts.yaml")["spec"] == yaml.safe_load(ALERTS.read_text())
    [(name, text)] = _load(folder / "dashboard.yaml")["data"].items()
    assert name == "deploykit.json"
    assert json.loads(text) == json.loads(DASHBOARD.read_text())


def test_kserves_runtime_reads_the_models_where_kserve_puts_them(folder: Path) -> None:
    runtime, service = (_load(folder / "kserve" / f"{name}.yaml") for name in ("serving-runtime", "inference-service"))
    [container] = runtime["spec"]["containers"]
    assert container["env"] == [{"name": "MODEL_REPOSITORY", "value": "/mnt/models"}]
    model = service["spec"]["predictor"]["model"]
    assert model["runtime"] == runtime["metadata"]["name"]
    assert model["modelFormat"] in runtime["spec"]["supportedModelFormats"]
