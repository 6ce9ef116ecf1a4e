"""A Triton model repository: one folder per model, with config.pbtxt and numbered version folders.

config.pbtxt is written once, then belongs to its readers: it is reviewed, edited and checked in.
Packaging again adds a version and only checks that the config still fits.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass, fields
from pathlib import Path
from string import Template
from typing import Any

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from deploykit.artifacts import Manifest, digest_of, load_manifest, new_directory, new_file, write_manifest
from deploykit.errors import ArtifactError, UsageError
from deploykit.predictor import find_graphs
from deploykit.runtime.batching import DEFAULT_TOKEN_BUDGET
from deploykit.tasks import Task, task_from_json, task_to_json

BACKEND = "deploykit"
CONFIG = "config.pbtxt"
OVERWRITE = "package it under another name, or pass --overwrite-config"
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*")


@dataclass(frozen=True)
class ServingSettings:
    """How Triton runs a model: the choices that config.pbtxt records.

    ``threads`` are CPU threads per instance, 0 for twice the CPUs shared among the instances.
    ``token_budget`` bounds rows x padded length of one run of the engine. Times are in microseconds.
    """

    max_batch_size: int = 64
    instances: int = 2
    threads: int = 0
    token_budget: int = DEFAULT_TOKEN_BUDGET
    max_queue_delay_us: int = 0
    max_queue_size: int = 1024
    queue_timeout_us: int = 10_000_000

    def __post_init__(self) -> None:
        for setting in fields(self):
            least = 0 if setting.name in ("threads", "max_queue_delay_us", "queue_timeout_us") else 1
            value = getattr(self, setting.name)
            if value < least:
                raise UsageError(f"{setting.name} is {value}", f"make it {least} or more")


@dataclass(frozen=True)
class Packaged:
    """A version folder in a model repository. ``config_kept``: an existing config.pbtxt stayed as it was."""

    path: Path
    name: str
    version: int
    manifest: Manifest
    reused: bool
    config_kept: bool


@dataclass(frozen=True)
class RepositoryModel:
    """A folder of a repository; ``versions`` ascend. ``problem`` says why it cannot be served."""

    name: str
    path: Path
    versions: tuple[int, ...]
    problem: ArtifactError | None = None


def package(
    export_dir: Path,
    name: str,
    repository: Path,
    *,
    engine: str = "auto",
    precision: str = "auto",
    settings: ServingSettings = ServingSettings(),
    overwrite_config: bool = False,
) -> Packaged:
    """Add an export to a model repository as the next version of ``name``.

    Raises UsageError for a bad name, ArtifactError when the export lacks the graph or an existing
    config.pbtxt does not fit the model.
    """
    check_name(name)
    export = load_manifest(export_dir, "export")
    graphs = find_graphs(export_dir, export, engine=engine, precision=precision)
    model = repository / name
    config = model / CONFIG
    keep = config.exists() and not overwrite_config
    if keep:
        check_config(config, export.task)
    else:
        text = config_text(export.task, settings)
        validate_config(text)
        with new_file(config) as new_config:
            new_config.write_text(text, encoding="utf-8")

    options = {"engine": graphs.engine, "precision": graphs.precision, "name": name}
    inputs = digest_of(export.digest, options)
    newest = max(versions_of(model), default=0)
    if newest and (manifest := _made_from(model / str(newest), inputs)):
        return Packaged(model / str(newest), name, newest, manifest, reused=True, config_kept=keep)
    out = model / str(newest + 1)
    with new_directory(out) as folder:
        for file in ("tokenizer.json", *graphs.files):
            shutil.copyfile(export_dir / file, folder / file)
        manifest = write_manifest(
            folder,
            "model",
            export.task,
            inputs=inputs,
            parent=export.digest,
            options=options,
            metrics=export.metrics,
        )
    return Packaged(out, name, newest + 1, manifest, reused=False, config_kept=keep)


def list_models(repository: Path) -> list[RepositoryModel]:
    """Every model folder, by name. Raises ArtifactError when there is no such repository."""
    if not repository.is_dir():
        raise ArtifactError(f"{repository}: no such directory", "run deploykit package, or check the path")
    found = []
    for folder in sorted(p for p in repository.iterdir() if p.is_dir() and not p.name.startswith(".")):
        problem = None
        try:
            read_config(folder / CONFIG)
        except ArtifactError as error:
            problem = error
        found.append(RepositoryModel(folder.name, folder, versions_of(folder), problem))
    return found


def verify_version(model: RepositoryModel) -> Manifest:
    """Check the newest version's files against their hashes, and config.pbtxt against its task."""
    manifest = load_manifest(model.path / str(model.versions[-1]), "model")
    check_config(model.path / CONFIG, manifest.task)
    return manifest


def versions_of(model: Path) -> tuple[int, ...]:
    """Numbers of a model's version folders, ascending."""
    if not model.is_dir():
        return ()
    return tuple(sorted(int(p.name) for p in model.iterdir() if p.is_dir() and re.fullmatch(r"[1-9]\d*", p.name)))


def check_name(name: str) -> None:
    """Raise UsageError unless ``name`` can be a folder and a part of a URL."""
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"model name {name!r} is not allowed", "use letters, digits, _ . and - only, not beginning with a dot"
        )


def config_text(task: Task, settings: ServingSettings) -> str:
    """The contents of config.pbtxt for a model of ``task``."""
    record = task_to_json(task)
    labels = record.pop("labels")
    return _CONFIG.substitute(
        {setting.name: getattr(settings, setting.name) for setting in fields(settings)},
        num_labels=len(labels),
        labels=_quoted(labels),
        task=_quoted(record),
    )


def validate_config(text: str, source: str = CONFIG) -> Any:
    """Parse a config with Triton's own schema; returns its ``ModelConfig`` message.

    Raises ArtifactError naming line and field.
    """
    try:
        return text_format.Parse(text, model_config_pb2.ModelConfig())
    except text_format.ParseError as error:
        raise ArtifactError(f"{source}: is not a Triton model config: {error}", "correct that line") from error


def read_config(path: Path) -> Any:
    """Parse a model's config.pbtxt. Raises ArtifactError also for another backend than ours."""
    try:
        config = validate_config(path.read_text(encoding="utf-8"), str(path))
    except FileNotFoundError:
        raise ArtifactError(f"{path}: no such file", "run deploykit package, or remove the folder") from None
    except UnicodeDecodeError as error:
        raise ArtifactError(f"{path}: is not UTF-8 text", "save it as UTF-8") from error
    if config.backend != BACKEND:
        raise ArtifactError(
            f"{path}: backend is {config.backend!r}, this server has {BACKEND!r} only",
            f'set backend: "{BACKEND}", or serve that model from another repository',
        )
    return config


def check_config(path: Path, task: Task) -> None:
    """Raise ArtifactError naming the first field of config.pbtxt that does not fit ``task``."""
    config = read_config(path)
    labels = _json_parameter(config, "labels")
    if labels != list(task.labels):
        raise ArtifactError(
            f"{path}: parameter labels is {_shown(labels)}, the model's labels are {_shown(list(task.labels))}",
            OVERWRITE,
        )
    wanted = text_format.Parse(config_text(task, ServingSettings()), model_config_pb2.ModelConfig())
    if config.name not in ("", path.parent.name):
        raise ArtifactError(f"{path}: name is {config.name!r}, its folder {path.parent.name!r}", "remove the name line")
    if config.max_batch_size < 1:
        raise ArtifactError(f"{path}: max_batch_size is {config.max_batch_size}", "make it 1 or more")
    for kind, present, needed in (("input", config.input, wanted.input), ("output", config.output, wanted.output)):
        _check_tensors(path, kind, _tensors(present), _tensors(needed))
    record = _json_parameter(config, "task")
    if not isinstance(record, dict):
        raise ArtifactError(f"{path}: parameter task is {_shown(record)}, not the model's task", OVERWRITE)
    expected = json.loads(json.dumps(task_to_json(task)))
    for key, value in expected.items():
        if key != "labels" and record.get(key) != value:
            raise ArtifactError(
                f"{path}: parameter task has {key} {_shown(record.get(key))}, the model {_shown(value)}", OVERWRITE
            )


def task_of_parameters(labels: str, task: str) -> Task:
    """The task that a config's parameters ``labels`` and ``task`` (JSON texts) describe.

    Raises ArtifactError or ValueError when they do not describe one.
    """
    return task_from_json({**json.loads(task), "labels": json.loads(labels)})


def _made_from(version: Path, inputs: str) -> Manifest | None:
    try:
        manifest = load_manifest(version, "model")
    except ArtifactError:
        return None  # a damaged version is never reused: the next one replaces it
    return manifest if manifest.inputs == inputs else None


def _check_tensors(path: Path, kind: str, present: dict[str, str], needed: dict[str, str]) -> None:
    for name in needed.keys() - present.keys():
        raise ArtifactError(f"{path}: lacks the {kind} {name} ({needed[name]})", OVERWRITE)
    for name, shape in present.items():
        if name not in needed:
            raise ArtifactError(f"{path}: has an {kind} {name} that the model does not", f"remove that {kind}")
        if shape != needed[name]:
            raise ArtifactError(f"{path}: {kind} {name} is {shape}, the model's is {needed[name]}", OVERWRITE)


def _tensors(messages: Any) -> dict[str, str]:
    return {m.name: f"{model_config_pb2.DataType.Name(m.data_type)} {list(m.dims)}" for m in messages}


def _json_parameter(config: Any, key: str) -> Any:
    if key not in config.parameters:
        return None
    try:
        return json.loads(config.parameters[key].string_value)
    except ValueError:
        return config.parameters[key].string_value


def _shown(value: Any) -> str:
    text = "absent" if value is None else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 200 else f"{text[:200]}…"


def _quoted(value: Any) -> str:
    """JSON as the inside of a single-quoted protobuf text string."""
    return json.dumps(value, ensure_ascii=False).replace("\\", "\\\\").replace("'", "\\'")


_CONFIG = Template("""\
# Written by `deploykit package`. Yours to edit: packaging again keeps it and checks that it fits.
backend: "deploykit"
# Most rows in one request, and in one dynamic batch.
max_batch_size: $max_batch_size

# A text. The backend tokenizes the whole batch: Triton would not merge token tensors of unequal length.
input { name: "TEXT" data_type: TYPE_STRING dims: [ 1 ] }

output { name: "LABEL" data_type: TYPE_STRING dims: [ 1 ] }
# Probabilities, in the order of the parameter labels below.
output { name: "SCORES" data_type: TYPE_FP32 dims: [ $num_labels ] }
# Empty, or why this row alone has no answer (its LABEL is empty, its SCORES 0: JSON knows no NaN).
output { name: "ERROR" data_type: TYPE_STRING dims: [ 1 ] }
# Best first; as many as the request parameter top_k asks for. Computed only when requested.
output { name: "TOP_LABELS" data_type: TYPE_STRING dims: [ -1 ] }
output { name: "TOP_SCORES" data_type: TYPE_FP32 dims: [ -1 ] }

dynamic_batching {
  # Requests that wait while a batch runs form the next one; a delay would only cost a lone client that time.
  max_queue_delay_microseconds: $max_queue_delay_us
  default_queue_policy {
    # Under overload answer 503 at once, rather than everyone late: clients can back off.
    max_queue_size: $max_queue_size
    # Whoever waited this long has given up; 0 waits for ever.
    default_timeout_microseconds: $queue_timeout_us
    timeout_action: REJECT
  }
}

# Each instance is a process with its own copy of the weights. At least two: with one, a queue policy
# makes Triton 2.51 miss wake-ups, and some answers then wait for its 500 ms timer (measured).
instance_group [ { kind: KIND_CPU count: $instances } ]
# The newest version folder alone is loaded.
version_policy { latest { num_versions: 1 } }

# CPU threads per instance; 0: twice the CPUs, shared among the instances.
parameters { key: "threads" value { string_value: "$threads" } }
# Rows x padded length of one run of the engine: more is no faster on a CPU, and takes more memory.
parameters { key: "token_budget" value { string_value: "$token_budget" } }
# What clients read to make sense of the scores.
parameters { key: "labels" value { string_value: '$labels' } }
parameters { key: "task" value { string_value: '$task' } }
""")
