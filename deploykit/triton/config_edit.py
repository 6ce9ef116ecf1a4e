"""Read the serving settings from a config.pbtxt, and change them without touching the rest of the file.

``google.protobuf.text_format`` would write the file anew, without the user's comments.

Source: Protocol Buffers documentation, "Text Format Language Specification".
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from deploykit.errors import ArtifactError
from deploykit.runtime.serving_settings import ServingSettings
from deploykit.tasks.protocol import TaskFacts
from deploykit.tasks.registry import task_of
from deploykit.triton.repository import OVERWRITE, validate_config

_TOKEN = re.compile(r"""#[^\n]*|"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*'|[{}<>\[\]:,;]|[^\s{}<>\[\]:,;#"']+""")
_OPENING, _CLOSING = "{<", "}>"
_BATCHING = "dynamic_batching"
_PREFERRED, _DELAY = (_BATCHING, "preferred_batch_size"), (_BATCHING, "max_queue_delay_microseconds")
_COUNT = ("instance_group", "count")


def settings_of(text: str, task: TaskFacts, source: str) -> ServingSettings:
    """Return the settings in config.pbtxt that tuning changes; other fields have their defaults.

    They are instances and threads and, by task, batches or rows of a step. Raises ArtifactError naming the field if
    ``with_settings`` could not change it.
    """
    config = validate_config(text, source)
    parameters = {key: config.parameters[key].string_value for key in config.parameters}
    if len(config.instance_group) != 1:
        raise ArtifactError(
            f"{source}: has {len(config.instance_group)} instance groups; tuning needs exactly one",
            f"write one instance_group with a count, or {OVERWRITE}",
        )
    common = {"instances": max(1, config.instance_group[0].count), "threads": _number(parameters, "threads", source)}
    if _is_batched(task):
        batching = config.dynamic_batching
        if len(batching.preferred_batch_size) > 1:
            sizes = ", ".join(map(str, batching.preferred_batch_size))
            raise ArtifactError(
                f"{source}: preferred_batch_size is {sizes}; tuning needs at most one", "keep one, or none"
            )
        return ServingSettings(
            **common,
            max_batch_size=config.max_batch_size,
            preferred_batch_size=next(iter(batching.preferred_batch_size), 0),
            max_queue_delay_us=batching.max_queue_delay_microseconds,
        )
    return ServingSettings(
        **common, max_batch_size=config.max_batch_size, max_rows=_number(parameters, "max_rows", source)
    )


def with_settings(text: str, task: TaskFacts, settings: ServingSettings, source: str) -> str:
    """Return config.pbtxt with those fields set to ``settings``. Comments, order and all other fields stay.

    Raises ArtifactError for a field that is missing.
    """
    fields: dict[tuple[str, str], str] = {_COUNT: str(settings.instances)}
    parameters = {"threads": str(settings.threads)}
    if _is_batched(task):
        fields[_PREFERRED] = f"[{settings.preferred_batch_size or ''}]"
        fields[_DELAY] = str(settings.max_queue_delay_us)
    else:
        parameters["max_rows"] = str(settings.max_rows)
    expected = validate_config(text, source)
    _set(expected, task, settings)
    changed = text
    for path, value in fields.items():
        changed = _with_field(changed, path, value, source)
    for name, value in parameters.items():
        changed = _with_parameter(changed, name, value, source)
    if validate_config(changed, source) != expected:
        raise ArtifactError(
            f"{source}: cannot be edited safely",
            f"set these there by hand: {', '.join(f'{path[-1]}: {value}' for path, value in fields.items())}, "
            f"{', '.join(f'{name}: {value}' for name, value in parameters.items())}; or {OVERWRITE}",
        )
    return changed


def _set(config: Any, task: TaskFacts, settings: ServingSettings) -> None:
    """Make the same change to the parsed config, to compare the edited text with."""
    config.instance_group[0].count = settings.instances
    config.parameters["threads"].string_value = str(settings.threads)
    if not _is_batched(task):
        config.parameters["max_rows"].string_value = str(settings.max_rows)
        return
    config.dynamic_batching.max_queue_delay_microseconds = settings.max_queue_delay_us
    del config.dynamic_batching.preferred_batch_size[:]
    if settings.preferred_batch_size:
        config.dynamic_batching.preferred_batch_size.append(settings.preferred_batch_size)


def _is_batched(task: TaskFacts) -> bool:
    """Return whether Triton forms the batches, rather than the model's decode loop."""
    return "preferred_batch_size" in task_of(task).settings


@dataclass(frozen=True)
class _Value:
    """Position of a field's value: a scalar, a list of scalars, or (``path`` ends in "") the inside of a message."""

    path: tuple[str, ...]
    start: int
    end: int


def _values(text: str) -> Iterator[_Value]:
    """Yield the values of a valid text in its order. A message's inside comes before its fields, and has no end."""
    messages: list[tuple[str, int | None]] = []
    # Start of the current list: None outside of a list, -1 in a list of messages.
    name, after_colon, list_start = "", False, None
    for match in _TOKEN.finditer(text):
        token = match[0]
        path = tuple(outer for outer, _ in messages)
        if token[0] in "#,;":
            continue
        if token == ":":
            after_colon = True
        elif token == "[":
            list_start = match.start()
        elif token == "]":
            if list_start is not None and list_start >= 0:
                yield _Value((*path, name), list_start, match.end())
            list_start, after_colon = None, False
        elif token in _OPENING:
            messages.append((name, None if list_start is None else -1))
            yield _Value((*path, name, ""), match.end(), match.end())
            list_start, after_colon = None, False
        elif token in _CLOSING:
            name, list_start = messages.pop()
        elif list_start is None and after_colon:
            yield _Value((*path, name), match.start(), match.end())
            after_colon = False
        elif list_start is None:
            name = token


def _with_field(text: str, path: tuple[str, str], value: str, source: str) -> str:
    found = [v for v in _values(text) if v.path == path]
    if len(found) == 1:
        return text[: found[0].start] + value + text[found[0].end :]
    inside = [v for v in _values(text) if v.path == (path[0], "")]
    if found or len(inside) != 1:
        problem = f"has {len(found)} times {path[1]}" if found else f"has no {path[0]}, in which {path[1]} would stand"
        raise ArtifactError(f"{source}: {problem}", f"correct that, or {OVERWRITE}")
    return f"{text[: inside[0].start]}\n  {path[1]}: {value}{text[inside[0].start :]}"


def _with_parameter(text: str, name: str, value: str, source: str) -> str:
    key = ""
    for found in _values(text):
        if found.path == ("parameters", "key"):
            key = text[found.start + 1 : found.end - 1]
        elif found.path == ("parameters", "value", "string_value") and key == name:
            return f'{text[: found.start]}"{value}"{text[found.end :]}'
    return f'{text.rstrip()}\nparameters {{ key: "{name}" value {{ string_value: "{value}" }} }}\n'


def _number(parameters: dict[str, str], name: str, source: str) -> int:
    given = parameters.get(name, str(getattr(ServingSettings, name)))
    if not given.isascii() or not given.isdigit():
        raise ArtifactError(f"{source}: parameter {name} is {given!r}", "make it a whole number, 0 or more")
    return int(given)
