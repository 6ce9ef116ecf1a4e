"""Forms that an answer must have: JSON of a schema, a regular expression, a choice, a grammar, or a tool call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import Field, model_validator

from deploykit.openai.read_body import Body

MAX_CHOICES = 1000
MAX_PATTERN_CHARS = 100_000


class JsonSchema(Body):
    name: str = Field(default="", max_length=64)
    description: str = ""
    schema_: dict[str, Any] | bool = Field(default=True, alias="schema")
    strict: bool = True


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _complete(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema and the type json_schema go together")
        return self

    def constraint(self) -> dict[str, Any]:
        """Return the sampling parameter for this format."""
        if self.type == "text":
            return {}
        return {"json_schema": self.json_schema.schema_ if self.json_schema else True}


class StructuredOutputs(Body):
    """vLLM's field for constraints that OpenAI's API lacks: exactly one of these."""

    json_: dict[str, Any] | None = Field(default=None, alias="json")
    regex: str | None = Field(default=None, min_length=1, max_length=MAX_PATTERN_CHARS)
    choice: list[str] | None = Field(default=None, min_length=1, max_length=MAX_CHOICES)
    grammar: str | None = Field(default=None, min_length=1, max_length=MAX_PATTERN_CHARS)

    @model_validator(mode="after")
    def _one(self) -> StructuredOutputs:
        if len(self.model_fields_set) != 1:
            raise ValueError("give exactly one of json, regex, choice and grammar")
        return self

    def constraint(self) -> dict[str, Any]:
        """Return the sampling parameter for this format."""
        found = self.model_dump(exclude_none=True)
        return {"json_schema" if name == "json_" else name: value for name, value in found.items()}


def tool_call_schema(tools: Sequence[tuple[str, Mapping[str, Any]]]) -> dict[str, Any]:
    """Return the JSON schema of a call of one of ``tools``, each a name and the schema of its arguments."""
    calls = []
    for index, (name, parameters) in enumerate(tools):
        place = f"#/anyOf/{index}/properties/arguments"
        calls.append(
            {
                "type": "object",
                "properties": {"name": {"const": name}, "arguments": _moved(parameters, place) or {"type": "object"}},
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
        )
    return {"anyOf": calls}


def _moved(schema: Any, place: str) -> Any:
    """Return ``schema`` with its references to itself (#/$defs/x) adjusted to its position ``place``."""
    if isinstance(schema, dict):
        return {
            name: place + value[1:]
            if name == "$ref" and isinstance(value, str) and value.startswith("#")
            else _moved(value, place)
            for name, value in schema.items()
        }
    return [_moved(item, place) for item in schema] if isinstance(schema, list) else schema
