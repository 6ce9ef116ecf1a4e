"""Objects that list properties forbid others, unless the schema says otherwise."""

from __future__ import annotations

import json
from typing import Any

import pytest

from deploykit.tasks.text_generation.closed_schema import close_objects

PERSON: dict[str, Any] = {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}
CLOSED = {**PERSON, "additionalProperties": False}


def copy(schema: Any) -> Any:
    return json.loads(json.dumps(schema))


@pytest.mark.parametrize(
    "within",
    [
        lambda s: s,
        lambda s: {"type": "array", "items": s},
        lambda s: {"type": "array", "prefixItems": [s]},
        lambda s: {"$defs": {"P": s}, "anyOf": [{"$ref": "#/$defs/P"}, {"type": "null"}]},
        lambda s: {"definitions": {"P": s}, "allOf": [{"$ref": "#/definitions/P"}]},
        lambda s: {"type": "object", "additionalProperties": s},
        lambda s: {"properties": {"not": s, "if": s}, "additionalProperties": True},
    ],
)
def test_an_object_is_closed_wherever_it_stands(within: Any) -> None:
    assert close_objects(copy(within(PERSON))) == within(CLOSED)


@pytest.mark.parametrize(
    "schema",
    [
        {**PERSON, "additionalProperties": True},
        {**PERSON, "additionalProperties": {"type": "integer"}},
        {**PERSON, "patternProperties": {"^x": {}}},
        {**PERSON, "required": ["name", "age"]},
        {"type": "object"},
        {"enum": [{"properties": {}}]},
        {"allOf": [PERSON, {"properties": {"age": {}}}]},
        {"$defs": {"P": PERSON}, "$ref": "#/$defs/P", "properties": {"age": {}}},
        {**PERSON, "anyOf": [{"properties": {"age": {}}}, {"properties": {"size": {}}}]},
        {"$defs": {"P": PERSON}, "$ref": "#/$defs/P", "required": ["age"]},
        {"required": ["a", "b"], "anyOf": [{"properties": {"a": {}}}, {"properties": {"b": {}}}]},
        {"not": PERSON},
        True,
        [],
        None,
        {"properties": 3, "anyOf": 3, "allOf": 3, "$defs": 3, "items": 3},
        {"properties": {}, "required": [{}]},
    ],
)
def test_what_may_have_other_properties_stays_open(schema: Any) -> None:
    assert close_objects(copy(schema)) == schema
