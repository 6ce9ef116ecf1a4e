"""Find a task by its name, its checkpoint or its manifest. Nothing else in deploykit lists the tasks.

A package adds a task with an entry point of the group ``deploykit.tasks``:

    [project.entry-points."deploykit.tasks"]
    token-classification = "my_package.task:TASK"
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.metadata
import importlib.util
import json
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from deploykit.errors import ArtifactError, UsageError
from deploykit.tasks.protocol import Task, TaskFacts
from deploykit.tasks.types import Command, Commanding

GROUP = "deploykit.tasks"
DEFAULT = "classification"
_OWN: Mapping[str, str] = {
    "classification": "deploykit.tasks.classification.task:TASK",
    "translation": "deploykit.tasks.translation.task:TASK",
    "question-answering": "deploykit.tasks.question_answering.task:TASK",
    "text-generation": "deploykit.tasks.text_generation.task:TASK",
}


@cache
def _locations() -> Mapping[str, str]:
    installed = {point.name: point.value for point in importlib.metadata.entry_points(group=GROUP)}
    return {**installed, **_OWN}


def task_names() -> list[str]:
    """Return the names of all tasks, deploykit's own first."""
    return [*_OWN, *sorted(_locations().keys() - _OWN.keys())]


@cache
def get_task(name: str) -> Task:
    """Import the task ``name``. Raises UsageError listing the known names if it is unknown."""
    if name not in _locations():
        raise UsageError(f"unknown task {name!r}", f"choose one of: {', '.join(task_names())}")
    module, attribute = _locations()[name].split(":")
    try:
        task: Task = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UsageError(
            f"the task {name} cannot be loaded from {_locations()[name]}: {error}",
            "correct or uninstall the package that adds it",
        ) from error
    return task


def task_commands() -> Iterator[tuple[str, Command]]:
    """Yield the commands of each task, deploykit's own first. Raises UsageError at a package that cannot be loaded."""
    for task in map(get_task, task_names()):
        if isinstance(task, Commanding):
            yield from task.commands.items()


def loadable_commands() -> dict[str, Command]:
    """Return the commands of the tasks by name, of two the first. Those after a package that cannot be loaded are missing."""
    found: dict[str, Command] = {}
    with contextlib.suppress(UsageError):
        for name, command in task_commands():
            found.setdefault(name, command)
    return found


def added_packages() -> list[Path]:
    """Return the module and metadata folders of packages that add tasks, for a Python with another path."""
    found: list[Path] = []
    for point in importlib.metadata.entry_points(group=GROUP):
        spec = importlib.util.find_spec(point.module.partition(".")[0])
        if spec is not None and spec.origin is not None:
            file = Path(spec.origin)
            found.append(file.parent if file.name == "__init__.py" else file)
        files = point.dist.files if point.dist is not None else None
        found += [Path(str(file.locate())).parent for file in files or () if file.name == "entry_points.txt"]
    return list(dict.fromkeys(found))


def task_of(facts: TaskFacts) -> Task:
    """Return the task of ``facts``."""
    return get_task(facts.name)


def owner_of(model_type: str) -> Task | None:
    """Return the task that claims a Hugging Face model type, or None."""
    return next((task for task in map(get_task, task_names()) if model_type in task.model_types), None)


def task_of_checkpoint(checkpoint: Path) -> Task:
    """Determine a checkpoint's task from deploykit's manifest, else from the head in ``architectures``, else from the
    task that optimum infers for that class, else from the model type.

    A folder with neither manifest.json nor config.json is a LoRA adapter of a classifier. A GGUF file holds a language
    model.
    """
    if checkpoint.suffix == ".gguf":
        return next(task for task in map(get_task, task_names()) if task.auto_model == "AutoModelForCausalLM")
    if name := _json(checkpoint / "manifest.json").get("task", {}).get("name"):
        return get_task(name)
    config = _json(checkpoint / "config.json")
    architectures = [str(name) for name in config.get("architectures") or ()]
    tasks = list(map(get_task, task_names()))
    for task in tasks:
        if any(architecture.endswith(task.heads) for architecture in architectures):
            return task
    auto_model = _auto_model(architectures[0]) if architectures else None
    found = next((task for task in tasks if task.auto_model == auto_model), None)
    return found or owner_of(str(config.get("model_type", ""))) or get_task(DEFAULT)


def _auto_model(architecture: str) -> str | None:
    """Return the name of the auto class for an architecture, by the task that optimum infers; None if unknown."""
    try:
        import transformers
        from optimum.exporters.tasks import TasksManager

        task = TasksManager.infer_task_from_model(getattr(transformers, architecture))
        return str(TasksManager.get_model_class_for_task(task).__name__)
    except (ImportError, AttributeError, ValueError, KeyError):  # optimum is not installed, or the class is unknown
        return None


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise ArtifactError(f"{path}: is not a JSON object", "copy the file again")
    return value


def task_to_json(facts: TaskFacts) -> dict[str, Any]:
    """Return the facts as JSON for a manifest."""
    return {"name": facts.name, **dataclasses.asdict(facts)}


def task_from_json(record: Mapping[str, Any]) -> TaskFacts:
    """Rebuild facts from a manifest. Raises ArtifactError for an unknown task or other fields."""
    try:
        return get_task(record["name"]).read_facts({k: _tuples(v) for k, v in record.items() if k != "name"})
    except (KeyError, TypeError, UsageError) as error:
        raise ArtifactError(
            f"the manifest describes a task this version of deploykit cannot read: {error}",
            "upgrade deploykit, or make the artifact again",
        ) from error


def task_of_parameters(parameters: Mapping[str, str]) -> TaskFacts:
    """Rebuild facts from parameters of a config.pbtxt: ``task`` and, for a classifier, ``labels`` (JSON strings).

    Raises KeyError, ValueError or ArtifactError when they describe no task.
    """
    labels = {"labels": json.loads(parameters["labels"])} if "labels" in parameters else {}
    return task_from_json({**json.loads(parameters["task"]), **labels})


def _tuples(value: Any) -> Any:
    """Convert JSON's lists to the tuples of the dataclasses."""
    if isinstance(value, dict):
        return {name: _tuples(item) for name, item in value.items()}
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value
