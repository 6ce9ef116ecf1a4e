"""The OpenAPI document of the port: its routes, their bodies, and the statuses that they answer with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

_REF = "#/components/schemas/{model}"
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_REFUSALS = {
    400: "The request is at fault: param names the field.",
    401: "The key is missing or wrong.",
    404: "There is no such model or route.",
    408: "The body did not arrive in time.",
    413: "The body is too large.",
    429: "The queue is full, or the key has too many requests open.",
    503: "Triton is restarting.",
    504: "The request took longer than the key's limit.",
}
_OF_READING = (400, 401, 404, 429, 503, 504)


def openapi_document(version: str, bodies: Mapping[str, type[BaseModel]], streams: tuple[str, ...]) -> dict[str, Any]:
    """Return the document. ``bodies`` are those of the POST routes; ``streams`` those of them that may answer in events."""
    schemas: dict[str, Any] = {"Error": _ERROR}
    paths: dict[str, Any] = {
        "/health": {"get": {"summary": "Whether Triton is ready", "security": [], "responses": {
            "200": _answer("It is."), "503": _answer("It is not.")}}},
        "/metrics": {"get": {"summary": "Prometheus metrics", "responses": _responses(
            {"200": {"description": "Metrics", "content": {"text/plain": {}}}}, _OF_READING)}},
        "/v1/models": {"get": {"summary": "The models", "responses": _responses({"200": _answer("A list")}, _OF_READING)}},
        "/v1/models/{name}": {"get": {"summary": "One model", "responses": _responses(
            {"200": _answer("The model")}, _OF_READING), "parameters": [
                {"name": "name", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}]}},
    }  # fmt: skip
    for route, body in bodies.items():
        schema = body.model_json_schema(ref_template=_REF)
        schemas |= schema.pop("$defs", {})
        schemas[body.__name__] = schema
        done = _answer("The answer")
        if route in streams:
            done["content"]["text/event-stream"] = {}
        paths[route] = {
            "post": {
                "requestBody": {"required": True, "content": {"application/json": {"schema": {"$ref": _REF.format(model=body.__name__)}}}},
                "responses": _responses({"200": done}, tuple(_REFUSALS)),
            }
        }  # fmt: skip
    return {
        "openapi": "3.1.0",
        "info": {"title": "deploykit", "version": version},
        "paths": paths,
        "components": {"schemas": schemas, "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
        "security": [{"key": []}, {}],
    }


def _answer(description: str) -> dict[str, Any]:
    return {"description": description, "content": {"application/json": {}}}


def _responses(found: dict[str, Any], statuses: tuple[int, ...]) -> dict[str, Any]:
    error = {"application/json": {"schema": {"$ref": _REF.format(model="Error")}}}
    return found | {str(status): {"description": _REFUSALS[status], "content": error} for status in statuses}
