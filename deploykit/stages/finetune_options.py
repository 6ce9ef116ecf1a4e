"""Read the options of a run from the command line, a TOML file, or an earlier run."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from deploykit.artifacts import load_manifest
from deploykit.data.reading import flag
from deploykit.errors import UsageError
from deploykit.tasks.registry import DEFAULT, get_task, task_names
from deploykit.training.options import RENAMED, FinetuneOptions, fit_multiple, option_names

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


ROWS = ("model", "train", "validation", "test", "teacher", "synonyms", "mask_model", "back_translate")
"""Options that name files, a repository on the hub, or a served model."""

STUDENT = "student"
"""An option that stands for others: see ``make_options``."""
_LAYERS = re.compile(r"layers=(?P<student_layers>[1-9][0-9]*)(,decoder=(?P<student_decoder_layers>[1-9][0-9]*))?")

OPTIONS: Mapping[str, type[FinetuneOptions]] = {name: get_task(name).options() for name in task_names()}


def make_options(given: Mapping[str, Any]) -> FinetuneOptions:
    """Complete the given options with defaults of the task, the preset or the continued run.

    ``student`` stands for other options. Makes file names absolute. Raises UsageError for an unknown option, or one of
    another task.
    """
    given = _with_student(given)
    given = _with_rows_of_run({name: _absolute(value) if name in ROWS else value for name, value in given.items()})
    task = given.get("task", DEFAULT)
    if task not in OPTIONS:
        raise UsageError(f"unknown task {task!r}", f"choose one of: {', '.join(OPTIONS)}")
    kind = OPTIONS[task]
    for name in given:
        if name not in option_names(kind):
            raise _unknown(name)
    return kind(**{**kind.preset(given.get("from_config")), **fit_multiple(kind, given)})


def _with_student(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options with ``student`` expanded: a checkpoint, or a number of layers of the model, which is the
    teacher if none is named."""
    student = given.get(STUDENT)
    rest = {name: value for name, value in given.items() if name != STUDENT}
    if not student:
        return rest
    if found := _LAYERS.fullmatch(student):
        counts = {name: int(count) for name, count in found.groupdict().items() if count}
        named = {"model": given["teacher"]} if given.get("teacher") and not given.get("model") else {}
        return {**rest, **counts, **named}
    if "=" in student:
        raise UsageError(
            f"--student is {student!r}", "write layers=3, layers=6,decoder=2 of a translator, or a checkpoint"
        )
    if given.get("model"):
        raise UsageError(f"two checkpoints are given: {given['model']} and --student {student}", "name one")
    return {**rest, "model": student}


def _absolute(source: Any) -> Any:
    """Return ``source``, one or several names, so that they are valid from any folder."""
    from deploykit.training.rows import absolute

    if isinstance(source, list | tuple):
        return tuple(map(absolute, source))
    return absolute(source) if source else source


def _unknown(name: str) -> UsageError:
    if owners := [task for task, kind in OPTIONS.items() if name in option_names(kind)]:
        shown = flag(STUDENT if name.startswith(STUDENT) else name)
        return UsageError(f"{shown} is for --task {' or '.join(owners)}", "leave it out")
    known = ", ".join(sorted({name for kind in OPTIONS.values() for name in option_names(kind)}))
    return UsageError(f"unknown option {name!r}", f"write {RENAMED[name]}" if name in RENAMED else f"known: {known}")


def _with_rows_of_run(given: Mapping[str, Any]) -> dict[str, Any]:
    """Add the rows of the earlier run, with its splits, to ``given`` for quantization-aware training if it names no
    rows, so that no training row of that run is held out."""
    run = Path(given.get("model") or "")
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
    """Read options from a TOML file, with keys of the dataclasses or their former names. Raises UsageError naming a
    wrong key."""
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}", "check the path") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: is not TOML: {error}", "correct the file") from error
    known = {STUDENT, *(name for kind in OPTIONS.values() for name in option_names(kind))}
    spelled = {key.replace("-", "_"): value for key, value in values.items()}
    options = {RENAMED.get(key, key): value for key, value in spelled.items()}
    for key in options:
        if key not in known:
            raise UsageError(f"{path}: unknown option {key!r}", f"known options: {', '.join(sorted(known))}")
    several = {field.name for kind in OPTIONS.values() for field in fields(kind) if isinstance(field.default, tuple)}
    return {key: [value] if key in several and isinstance(value, str) else value for key, value in options.items()}
