"""Read the options of a run: from the command line, from a TOML file, from a run made before."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deploykit.artifacts import load_manifest
from deploykit.errors import UsageError
from deploykit.tasks.registry import DEFAULT, get_task, task_names
from deploykit.training.options import FinetuneOptions, flag, option_names

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


OPTIONS: Mapping[str, type[FinetuneOptions]] = {name: get_task(name).options() for name in task_names()}


def make_options(given: Mapping[str, Any]) -> FinetuneOptions:
    """The options of a run from those that were named; the rest are the task's and the preset's defaults.

    Raises UsageError for an option of another task.
    """
    kind = OPTIONS[given.get("task", DEFAULT)]
    for name in given:
        if name not in option_names(kind):
            owner = next(task for task, other in OPTIONS.items() if name in option_names(other))
            raise UsageError(f"{flag(name)} is for --task {owner}", "leave it out")
    return kind(**{**kind.preset(given.get("from_config")), **given})


def with_rows_of_run(given: Mapping[str, Any]) -> dict[str, Any]:
    """Add the rows of the run to ``given`` for quantization-aware training that names no rows.

    The rows are those of the deploykit run that ``model`` names, with its splits, so that no training row is held out.
    """
    run = Path(given.get("model", ""))
    splits = {name: run / "splits" / f"{name}.jsonl" for name in ("train", "validation", "test")}
    if not given.get("qat") or {*splits} & {*given} or not splits["train"].is_file():
        return dict(given)
    facts = load_manifest(run, "checkpoint", verify=False).task
    kind = OPTIONS[facts.name]
    if "qat" not in option_names(kind):
        owners = [name for name, other in OPTIONS.items() if "qat" in option_names(other)]
        raise UsageError(
            f"--qat is for --task {' or '.join(owners)}, and {run} was made for {facts.name}", "leave it out"
        )
    rows = {name: str(path) for name, path in splits.items() if path.is_file()}
    return {**kind.of_run(facts), **given, **rows}


def read_toml(path: Path) -> dict[str, Any]:
    """Read options from a TOML file, with the dataclasses' names as keys. Raises UsageError naming a wrong key."""
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}", "check the path") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: is not TOML: {error}", "correct the file") from error
    known = {name for kind in OPTIONS.values() for name in option_names(kind)}
    options = {key.replace("-", "_"): value for key, value in values.items()}
    for key in options:
        if key not in known:
            raise UsageError(f"{path}: unknown option {key!r}", f"known options: {', '.join(sorted(known))}")
    return options
