"""Find a task by its name, its checkpoint or its manifest. Nothing else in deploykit lists the tasks.

A package adds a task with an entry point of the group ``deploykit.tasks``:

    [project.entry-points."deploykit.tasks"]
    token-classification = "my_package.task:TASK"
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from deploykit.errors import ArtifactError, UsageError
from deploykit.tasks.protocol import Task, TaskFacts

GROUP = "deploykit.tasks"
DEFAULT = "classification"
_OWN: Mapping[str, str] = {
    "classification": "deploykit.tasks.classification.task:TASK",
    "translation": "deploykit.tasks.translation.task:TASK",
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
    """Import the task of that name. Raises UsageError for an unknown one, naming those that there are."""
    if name not in _locations():
        raise UsageError(f"unknown task {name!r}", f"choose one of: {', '.join(task_names())}")
    module, attribute = _locations()[name].split(":")
    task: Task = getattr(importlib.import_module(module), attribute)
    return task


def task_of(facts: TaskFacts) -> Task:
    """Return the task whose facts these are."""
    return get_task(facts.name)


def owner_of(model_type: str) -> Task | None:
    """Return the task that claims a Hugging Face model type, or None."""
    return next((task for task in map(get_task, task_names()) if model_type in task.model_types), None)


def task_of_checkpoint(checkpoint: Path) -> Task:
    """Decide what a Hugging Face checkpoint is for, by the head that its ``architectures`` name, else by its model type.

    A folder without config.json is a LoRA adapter of a classifier.
    """
    path = checkpoint / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    architectures = [str(name) for name in config.get("architectures") or ()]
    for task in map(get_task, task_names()):
        if any(architecture.endswith(task.heads) for architecture in architectures):
            return task
    return owner_of(str(config.get("model_type", ""))) or get_task(DEFAULT)


def task_to_json(facts: TaskFacts) -> dict[str, Any]:
    """Return the facts as a manifest holds them."""
    return {"name": facts.name, **dataclasses.asdict(facts)}


def task_from_json(record: Mapping[str, Any]) -> TaskFacts:
    """Rebuild facts from a manifest. Raises ArtifactError for a task that is unknown here, or has other fields."""
    try:
        return get_task(record["name"]).read_facts({k: _tuples(v) for k, v in record.items() if k != "name"})
    except (KeyError, TypeError, UsageError) as error:
        raise ArtifactError(
            f"the manifest describes a task this version of deploykit cannot read: {error}",
            "upgrade deploykit, or make the artifact again",
        ) from error


def task_of_parameters(parameters: Mapping[str, str]) -> TaskFacts:
    """Rebuild facts from the parameters of a config.pbtxt: ``task`` and, of a classifier, ``labels`` (JSON texts).

    Raises KeyError, ValueError or ArtifactError when they describe no task.
    """
    labels = {"labels": json.loads(parameters["labels"])} if "labels" in parameters else {}
    return task_from_json({**json.loads(parameters["task"]), **labels})


def _tuples(value: Any) -> Any:
    """Return JSON's lists as the tuples that the dataclasses hold."""
    if isinstance(value, dict):
        return {name: _tuples(item) for name, item in value.items()}
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value
