"""A Triton model repository: one folder per model, with config.pbtxt and numbered version folders.

deploykit writes config.pbtxt once. After that it belongs to the user, who may review, edit and commit it. Packaging
again adds a version and only checks that the config still fits.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
import shlex
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from google.protobuf import text_format

from deploykit.artifacts import Manifest, digest_of, load_manifest, new_directory, new_file, write_manifest
from deploykit.errors import ArtifactError, UsageError
from deploykit.runtime.engines import ENGINES
from deploykit.runtime.engines.tensorrt import read_record
from deploykit.runtime.find_graphs import find_graphs
from deploykit.runtime.serving_settings import ServingSettings, check_name
from deploykit.signatures import verify_signature
from deploykit.tasks.protocol import TaskFacts
from deploykit.tasks.registry import get_task, task_names, task_of, task_to_json
from deploykit.tasks.types import Drafting
from deploykit.triton.backends import BACKEND

CONFIG = "config.pbtxt"


def _load_schema() -> Any:
    """Load Triton's schema of config.pbtxt: one module of tritonclient, whose package imports gRPC, at twice the time."""
    package = importlib.util.find_spec("tritonclient.grpc")
    assert package is not None
    assert package.origin is not None
    spec = importlib.util.spec_from_file_location(
        "tritonclient_model_config", Path(package.origin).with_name("model_config_pb2.py")
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


OVERWRITE = "package it under another name, or pass --overwrite-config"
COMPOSE = Path(__file__).parent / "container" / "compose.yaml"
"""Compose file that serves a repository in NVIDIA's container."""
_SCHEMA = _load_schema()
STREAM_SUFFIX = "_stream"
"""Suffix of the model that sends the sentences of a document as each is translated."""


@dataclass(frozen=True)
class Packaged:
    """A version folder in a model repository. ``config_kept``: an existing config.pbtxt was not changed."""

    path: Path
    name: str
    version: int
    manifest: Manifest
    reused: bool
    config_kept: bool


@dataclass(frozen=True)
class RepositoryModel:
    """A model folder of a repository; ``versions`` ascend. ``problem`` says why it cannot be served."""

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
    settings: ServingSettings | None = None,
    overwrite_config: bool = False,
    stream: bool = True,
    require_signature: Path | None = None,
    draft_model: Path | None = None,
) -> Packaged:
    """Add an export to a model repository as the next version of ``name``.

    Unless ``stream`` is off, a translation model gets a second model, NAME_stream, which sends the sentences
    of a document as each is translated. With ``require_signature``, a public key, the export must be signed with its
    private key. ``draft_model``: the export of a smaller language model, whose weights are packaged too: it guesses tokens.
    Raises UsageError for a bad name or setting, ArtifactError when the export lacks the graph or is not
    signed, or an existing config.pbtxt does not fit the model.
    """
    check_name(name)
    if require_signature is not None:
        verify_signature(export_dir, require_signature)
    export = load_manifest(export_dir, "export")
    settings = settings or ServingSettings()
    _check_settings(export.task, settings)
    graphs = find_graphs(export_dir, export, engine=engine, precision=precision, to_run=False)
    options = {"engine": graphs.engine, "precision": graphs.precision, "name": name}
    sources = {
        file: export_dir / file for file in (*graphs.files, *task_of(export.task).tokenizer_files(list(export.files)))
    }
    if draft_model is not None:
        task = task_of(export.task)
        if not isinstance(task, Drafting):
            raise UsageError(
                f"a draft model is for language models, and {export_dir} is none", "leave --draft-model out"
            )
        files, options["draft_model"] = task.draft_files(export_dir, graphs.engine, draft_model)
        sources |= files
    streamer = f"{name}{STREAM_SUFFIX}" if stream and task_of(export.task).stream_backend else None

    kept = _place_config(repository / name, export.task, settings, engine=graphs.engine, overwrite=overwrite_config)
    if streamer is not None:
        _place_config(repository / streamer, export.task, settings, streams=name, overwrite=overwrite_config)
    path, manifest, reused = _add_version(repository / name, export, sources, options)
    if streamer is not None:
        _add_version(repository / streamer, export, {}, {"name": streamer, "streams": name})
    return Packaged(path, name, int(path.name), manifest, reused=reused, config_kept=kept)


def refuse_ignored(model: Path, setting: str) -> None:
    """Raise UsageError if the folder of a model has a config.pbtxt, which is kept, so that ``setting`` has no
    effect."""
    if (model / CONFIG).exists():
        raise UsageError(
            f"{model / CONFIG} already exists and is kept, so {setting} has no effect",
            "edit that file, or pass --overwrite-config to replace it",
        )


def container_command(packaged: Packaged) -> str | None:
    """Return the command that serves a GPU model's repository in NVIDIA's container; None for CPU engines."""
    engine = next((file for file in packaged.manifest.files if file.endswith(".engine")), None)
    if engine is None:
        return None
    models = packaged.path.resolve().parents[1]
    variables = f"ENGINE={read_record(packaged.path / engine).requirement} MODELS={shlex.quote(str(models))}"
    return f"{variables} docker compose -f {shlex.quote(str(COMPOSE))} up --build --detach"


def list_models(repository: Path) -> list[RepositoryModel]:
    """Return every model folder, by name. Raises ArtifactError if the repository does not exist."""
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


def verify_version(model: RepositoryModel, require_signature: Path | None = None) -> Manifest:
    """Check the newest version's files against their hashes, and config.pbtxt against its task.

    With ``require_signature``, a public key, first check the signature of the model's folder.
    """
    if require_signature is not None:
        verify_signature(model.path, require_signature)
    manifest = load_manifest(model.path / str(model.versions[-1]), "model")
    check_config(model.path / CONFIG, manifest.task, manifest.options.get("streams"), manifest.options.get("engine"))
    return manifest


def versions_of(model: Path) -> tuple[int, ...]:
    """Return the numbers of a model's version folders, ascending."""
    if not model.is_dir():
        return ()
    return tuple(sorted(int(p.name) for p in model.iterdir() if p.is_dir() and re.fullmatch(r"[1-9]\d*", p.name)))


def config_text(
    task: TaskFacts, settings: ServingSettings, streams: str | None = None, engine: str | None = None
) -> str:
    """Return config.pbtxt for a model of ``task`` on ``engine`` (None: a CPU engine).

    With ``streams``, it is for the model that streams the translations of that model.
    """
    record = task_to_json(task)
    values = {setting.name: getattr(settings, setting.name) for setting in fields(settings)}
    values["instances"] = settings.instances or task_of(task).instances
    values["in_flight"] = int(settings.in_flight)
    values["preferred_batch_size"] = settings.preferred_batch_size or ""
    values["kind"] = _kind(engine)
    return task_of(task).config_text(values, record, streams)


def validate_config(text: str, source: str = CONFIG) -> Any:
    """Parse a config with Triton's own schema. Returns its ``ModelConfig`` message.

    Raises ArtifactError naming line and field.
    """
    try:
        return text_format.Parse(text, _SCHEMA.ModelConfig())
    except text_format.ParseError as error:
        raise ArtifactError(f"{source}: is not a Triton model config: {error}", "correct that line") from error


def read_config(path: Path) -> Any:
    """Parse a model's config.pbtxt. Raises ArtifactError if it is invalid or for another backend."""
    try:
        config = validate_config(path.read_text(encoding="utf-8"), str(path))
    except FileNotFoundError:
        raise ArtifactError(f"{path}: no such file", "run deploykit package, or remove the folder") from None
    except UnicodeDecodeError as error:
        raise ArtifactError(f"{path}: is not UTF-8 text", "save it as UTF-8") from error
    if config.backend != BACKEND:
        raise ArtifactError(
            f"{path}: backend is {config.backend!r}, but this server has only {BACKEND!r}",
            f'set backend: "{BACKEND}", or move that model to another repository',
        )
    return config


def check_config(path: Path, task: TaskFacts, streams: str | None = None, engine: str | None = None) -> None:
    """Raise ArtifactError naming the first field of config.pbtxt that does not fit ``task`` and, if given,
    ``engine``."""
    config = read_config(path)
    wanted = text_format.Parse(config_text(task, ServingSettings(), streams), _SCHEMA.ModelConfig())
    for key, of_model in (("labels", "the model's labels are"), ("streams", "it must stream")):
        value, expected = _json_parameter(config, key), _json_parameter(wanted, key)
        if value != expected:
            raise ArtifactError(f"{path}: parameter {key} is {_shown(value)}, {of_model} {_shown(expected)}", OVERWRITE)
    if config.name not in ("", path.parent.name):
        raise ArtifactError(
            f"{path}: name is {config.name!r}, but its folder is {path.parent.name!r}", "remove the name line"
        )
    if min(config.max_batch_size, 1) != min(wanted.max_batch_size, 1):
        remedy = "make it 1 or more" if wanted.max_batch_size else "make it 0"
        raise ArtifactError(f"{path}: max_batch_size is {config.max_batch_size}", remedy)
    kinds = {_SCHEMA.ModelInstanceGroup.Kind.Name(group.kind) for group in config.instance_group}
    if engine is not None and kinds & {"KIND_CPU", "KIND_GPU"} - {_kind(engine)}:
        raise ArtifactError(
            f"{path}: instance_group has {', '.join(sorted(kinds))}, the engine {engine} runs on {_kind(engine)}",
            f"change it there, or {OVERWRITE}",
        )
    if config.model_transaction_policy.decoupled != wanted.model_transaction_policy.decoupled:
        raise ArtifactError(f"{path}: model_transaction_policy does not fit the model", OVERWRITE)
    for kind, present, needed in (("input", config.input, wanted.input), ("output", config.output, wanted.output)):
        _check_tensors(path, kind, _tensors(present), _tensors(needed))
    record, expected = _json_parameter(config, "task"), _json_parameter(wanted, "task")
    if not isinstance(record, dict):
        raise ArtifactError(f"{path}: parameter task is {_shown(record)}, not the model's task", OVERWRITE)
    # A config of an earlier version lacks newer facts, which then have their defaults.
    defaults = json.loads(json.dumps(_defaults(task)))
    for key, value in expected.items():
        given, default = record.get(key, defaults.get(key)), defaults.get(key)
        if isinstance(given, dict) and isinstance(default, dict):
            given = {**default, **given}
        if given != value:
            raise ArtifactError(
                f"{path}: parameter task has {key} {_shown(given)}, the model {_shown(value)}", OVERWRITE
            )


def _defaults(task: TaskFacts) -> dict[str, Any]:
    """Return the defaults of a task's facts, those of dataclasses as dictionaries."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(task):
        if field.default is not dataclasses.MISSING:
            found[field.name] = field.default
        elif field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
            nested = dataclasses.is_dataclass(default) and not isinstance(default, type)
            found[field.name] = dataclasses.asdict(default) if nested else default
    return found


def _kind(engine: str | None) -> str:
    return "KIND_GPU" if engine is not None and ENGINES[engine].gpu else "KIND_CPU"


def _check_settings(task: TaskFacts, settings: ServingSettings) -> None:
    own = task_of(task).settings
    for other in map(get_task, task_names()):
        for setting in fields(settings):
            changed = getattr(settings, setting.name) != setting.default
            if changed and setting.name in other.settings and setting.name not in own:
                message = f"{setting.name} is a setting of {other.name}, the model does {task.name}"
                raise UsageError(message, "leave it out")


def _place_config(
    model: Path,
    task: TaskFacts,
    settings: ServingSettings,
    *,
    streams: str | None = None,
    engine: str | None = None,
    overwrite: bool,
) -> bool:
    """Write config.pbtxt, or check the existing one. Returns True if an existing one was kept."""
    path = model / CONFIG
    if path.exists() and not overwrite:
        check_config(path, task, streams, engine)
        return True
    text = config_text(task, settings, streams, engine)
    validate_config(text)
    with new_file(path) as new_config:
        new_config.write_text(text, encoding="utf-8")
    return False


def _add_version(
    model: Path, export: Manifest, sources: Mapping[str, Path], options: Mapping[str, str]
) -> tuple[Path, Manifest, bool]:
    """Copy ``sources``, files by their new names, to the next version folder, unless the newest one has the same content.

    Returns the folder, its manifest, and whether it existed before.
    """
    inputs = digest_of(export.digest, options)
    newest = max(versions_of(model), default=0)
    if newest and (manifest := _made_from(model / str(newest), inputs)):
        return model / str(newest), manifest, True
    out = model / str(newest + 1)
    with new_directory(out) as folder:
        for name, source in sources.items():
            shutil.copyfile(source, folder / name)
        manifest = write_manifest(
            folder,
            "model",
            export.task,
            inputs=inputs,
            parent=export.digest,
            options=options,
            metrics=export.metrics,
        )
    return out, manifest, False


def _made_from(version: Path, inputs: str) -> Manifest | None:
    try:
        manifest = load_manifest(version, "model")
    except ArtifactError:
        return None  # a damaged version is never reused; a new one replaces it
    return manifest if manifest.inputs == inputs else None


def _check_tensors(path: Path, kind: str, present: dict[str, str], needed: dict[str, str]) -> None:
    for name in needed.keys() - present.keys():
        raise ArtifactError(f"{path}: lacks the {kind} {name} ({needed[name]})", OVERWRITE)
    for name, shape in present.items():
        if name not in needed:
            raise ArtifactError(f"{path}: has an {kind} {name} that the model does not have", f"remove that {kind}")
        if shape != needed[name]:
            raise ArtifactError(f"{path}: {kind} {name} is {shape}, the model's is {needed[name]}", OVERWRITE)


def _tensors(messages: Any) -> dict[str, str]:
    return {m.name: f"{_SCHEMA.DataType.Name(m.data_type)} {list(m.dims)}" for m in messages}


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
