"""Write the Kubernetes manifests and the Helm chart of a model repository in NVIDIA's container.

Both come from the templates in this folder: in the chart, the values are Helm's expressions.
"""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from deploykit.artifacts import new_file
from deploykit.triton.monitoring import ALERTS, DASHBOARD

_IMAGE = "deploykit-triton"
_VALUES = {
    "image": f"{_IMAGE}:26.06",
    "claim": "models",
    "gpus": 0,
    "cpu": 2,
    "memory": "4Gi",
    "min_replicas": 2,
    "max_replicas": 8,
    "queue_us": 20000,
}
_KINDS = (
    "deployment",
    "service",
    "autoscaler",
    "disruption-budget",
    "network-policy",
    "service-monitor",
    "alerts",
    "dashboard",
)
_PARTS = {"init_containers": "[]", "egress": "[]"}
_CLAIM = "persistentVolumeClaim: {claimName: CLAIM, readOnly: true}"
_VOLUME_IN_CHART = (
    '{{ .Values.volume | default (dict "persistentVolumeClaim" (dict "claimName" .Values.claim "readOnly" true)) '
    "| toYaml | nindent 10 | trim }}"
)
# Helm would take the dashboard's own braces for expressions.
_FILE_IN_CHART = '{{ .Files.Get "dashboard.json" | nindent 4 | trim }}'
_KSERVE = ("serving-runtime", "inference-service")
# Configures another chart, so it is no resource of this one.
_ADAPTER = "prometheus-adapter"
_SOURCES = ("models-from-image", "models-from-bucket")


def write_kubernetes(name: str, folder: Path, *, gpus: int) -> list[Path]:
    """Write the manifests of the deployment ``name`` to ``folder``, and its Helm chart to ``folder/chart``.

    Each pod asks for ``gpus`` GPUs. Returns the files. Files that are there already are replaced.
    """
    values = {**_VALUES, "gpus": gpus}
    parts = {**_PARTS, "volume": _CLAIM.replace("CLAIM", str(values["claim"]))}
    dashboard = DASHBOARD.read_text(encoding="utf-8").rstrip()
    contents = {"alerts": ALERTS.read_text(encoding="utf-8").rstrip(), "dashboard": dashboard}
    expressions = {key: f"{{{{ .Values.{_camel(key)} }}}}" for key in values}
    expressions |= {key: f"{{{{ toJson .Values.{_camel(key)} }}}}" for key in _PARTS}
    defaults = "".join(f"{_camel(key)}: {value}\n" for key, value in (values | _PARTS).items())
    chart = f"apiVersion: v2\nname: {name}\nversion: 1.0.0\ndescription: A deploykit model repository on Triton\n"
    resources = "".join(f"  - {kind}.yaml\n" for kind in _KINDS)
    files = {
        "kustomization.yaml": "# kubectl apply -k FOLDER. Name your image here.\n"
        f"resources:\n{resources}images:\n  - name: {_IMAGE}\n    newName: {_IMAGE}\n",
        "chart/Chart.yaml": chart,
        "chart/dashboard.json": f"{dashboard}\n",
        "chart/values.yaml": "# The image that compose.yaml builds, in your registry; the claim that holds the models, or another volume.\n"
        f"{defaults}volume: {{}}\n",
    }
    templates = Environment(
        loader=PackageLoader(__name__, ""), undefined=StrictUndefined, keep_trailing_newline=True, autoescape=False
    )
    folders = dict.fromkeys(_KSERVE, "kserve/") | dict.fromkeys(_SOURCES, "chart/")
    for kind in (*_KINDS, *_KSERVE, _ADAPTER, *_SOURCES):
        template = templates.get_template(f"{kind}.yaml.j2")
        files[f"{folders.get(kind, '')}{kind}.yaml"] = template.render(values, name=name, **parts, **contents)
        if kind in _KINDS:
            files[f"chart/templates/{kind}.yaml"] = template.render(
                expressions,
                name="{{ .Release.Name }}",
                volume=_VOLUME_IN_CHART,
                **{**contents, "dashboard": _FILE_IN_CHART},
            )
    for path, text in files.items():
        with new_file(folder / path) as file:
            file.write_text(text, encoding="utf-8")
    return [folder / path for path in files]


def _camel(key: str) -> str:
    first, *rest = key.split("_")
    return first + "".join(map(str.capitalize, rest))
