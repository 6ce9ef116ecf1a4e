"""Close the objects of a JSON Schema: forbid properties that it does not list.

JSON Schema allows them if ``additionalProperties`` is missing, and pydantic and zod leave it out. A small model then
invents properties until its tokens run out. vLLM and llama.cpp forbid them too.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

_OPEN = {"additionalProperties", "patternProperties", "unevaluatedProperties"}
"""Keywords that say which other properties an object may have."""
_MERGING = {"not", "if", "dependentSchemas", "unevaluatedProperties", "$dynamicRef"}
_COMBINING = {"allOf", "anyOf", "oneOf", "$ref"}
_OF_OBJECTS = {"properties", "required", "minProperties", "dependentRequired"}
_NAMED = ("properties", "$defs", "definitions")
_LISTED = ("allOf", "anyOf", "oneOf", "prefixItems")
_SINGLE = ("items", "additionalProperties")


def close_objects(schema: Any) -> Any:
    """Return ``schema``, changed in place: objects that list properties, without a rule for others, forbid others.

    It stays unchanged if it merges objects, for example by ``allOf``: a closed part would forbid the properties of the other
    parts.
    """
    parts = list(_parts(schema))
    if not any(map(_merges, parts)):
        for part in parts:
            listed, required = part.get("properties"), part.get("required")
            others = isinstance(required, list) and any(name not in (listed or ()) for name in map(str, required))
            if isinstance(listed, dict) and not others and not _OPEN & part.keys():
                part["additionalProperties"] = False
    return schema


def _parts(schema: Any) -> Iterator[dict[str, Any]]:
    """Yield ``schema`` and all schemas in it."""
    waiting = [schema]
    while waiting:
        part = waiting.pop()
        if not isinstance(part, dict):
            continue
        yield part
        waiting += [part.get(keyword) for keyword in _SINGLE]
        for keyword in _NAMED:
            if isinstance(part.get(keyword), dict):
                waiting += part[keyword].values()
        for keyword in _LISTED:
            if isinstance(part.get(keyword), list):
                waiting += part[keyword]


def _merges(part: dict[str, Any]) -> bool:
    combined = _COMBINING & part.keys()
    all_of = part.get("allOf")
    return (
        bool(_MERGING & part.keys())
        or len(combined) > 1
        or (bool(combined) and bool(_OF_OBJECTS & part.keys()))
        or (isinstance(all_of, list) and len(all_of) > 1)
    )
