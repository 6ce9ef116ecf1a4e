"""Bodies that are refused: each names its field, and none makes the server fail."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from openai_service import Service

from deploykit.openai.chat_request import ChatBody
from deploykit.openai.completion_request import CompletionBody
from deploykit.openai.errors import ApiError
from deploykit.openai.predictors import TextsBody
from deploykit.openai.read_body import Body, parse_body

USER = {"role": "user", "content": "Hello"}
CHAT: dict[str, Any] = {"model": "writer", "messages": [USER]}
TEXT: dict[str, Any] = {"model": "writer", "prompt": "Hello"}
TOOL: dict[str, Any] = {"type": "function", "function": {"name": "get", "parameters": {}}}
CALL = {"id": "c", "type": "function", "function": {"name": "get", "arguments": "[]"}}


def refusal(kind: type[Body], body: dict[str, Any]) -> ApiError:
    with pytest.raises(ApiError) as raised:
        parse_body(json.dumps(body).encode(), kind)
    return raised.value


@pytest.mark.parametrize(
    ("fields", "param", "told"),
    [
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": None}, "messages", "missing"),
        ({"messages": "Hello"}, "messages", "list"),
        ({"messages": [{**USER, "role": "wizard"}]}, "messages[0].role", "'user'"),
        ({"messages": [USER, {"role": "user"}]}, "messages[1]", "content is missing"),
        ({"messages": [{**USER, "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "messages[0].content", "part 0 should be {type: text, text: …}, it is image_url"),
        ({"messages": [{**USER, "content": [{"type": "text", "text": 1}]}]}, "messages[0].content", "part 0"),
        ({"messages": [{**USER, "tool_calls": [CALL]}]}, "messages[0].tool_calls[0].function.arguments", "JSON object"),
        ({"temperature": -0.1}, "temperature", "greater than or equal to 0"),
        ({"temperature": "1"}, "temperature", "number"),
        ({"temperature": True}, "temperature", "number"),
        ({"n": 1_000_000}, "n", "less than or equal to 16"),
        ({"n": 1.5}, "n", "integer"),
        ({"stop": ["x"] * 1_000_000}, "stop", "at most 16"),
        ({"stop": ["a", ""]}, "stop[1]", "at least 1 character"),
        ({"stop": "x" * 1001}, "stop[0]", "at most 1000"),
        ({"seed": -1}, "seed", "greater"),
        ({"max_tokens": 0}, "max_tokens", "greater"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens", "differs"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"logit_bias": {"hello": 1}}, "logit_bias", "token ids"),
        ({"logit_bias": {"1": 101}}, "logit_bias.1", "100"),
        ({"top_logprobs": 2}, "top_logprobs", "logprobs true"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "20"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "stream"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "json_schema"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "json_schema"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs", "exactly one"),
        ({"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}}, "structured_outputs", "not both"),
        ({"tools": [TOOL, TOOL]}, "tools", "same name"),
        ({"tools": [{**TOOL, "type": "retrieval"}]}, "tools[0].type", "function"),
        ({"tools": [TOOL], "tool_choice": "must"}, "tool_choice", "required"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "put"}}}, "tool_choice", "no function"),
        ({"tool_choice": "required"}, "tool_choice", "no tools"),
        ({"tools": [TOOL], "response_format": {"type": "json_object"}}, "response_format", "tool calls"),
        ({"modalities": ["audio"]}, "modalities[0]", "text"),
        ({"max_token": 5}, "max_token", "not supported"),
        ({"model": 5}, "model", "string"),
    ],
)  # fmt: skip
def test_a_refused_field_of_a_chat_is_named(fields: dict[str, Any], param: str, told: str) -> None:
    error = refusal(ChatBody, {**CHAT, **fields})
    assert error.status == 400
    assert error.param == param
    assert error.message.startswith(f"{param}: ")
    assert told in error.message


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}}, "response_format"),
        ({"structured_outputs": {"json": {}}}, "structured_outputs.json"),
        ({"tools": [TOOL], "tool_choice": "required"}, "tools"),
    ],
)
def test_the_field_of_a_schema_is_known(fields: dict[str, Any], field: str) -> None:
    asked = parse_body(json.dumps({**CHAT, **fields}).encode(), ChatBody).asked()
    assert asked.schema_field == field
    assert "json_schema" in asked.sampling


@pytest.mark.parametrize(
    ("fields", "param", "told"),
    [
        ({"prompt": [1, -2, 3]}, "prompt", "token ids"),
        ({"prompt": [1, True]}, "prompt", "token ids"),
        ({"prompt": ["a", [1, "b"]]}, "prompt", "token ids"),
        ({"prompt": [[1], []]}, "prompt", "token ids"),
        ({"prompt": [[2**31]]}, "prompt", "token ids"),
        ({"prompt": []}, "prompt", "at least 1"),
        ({"prompt": ""}, "prompt", "empty"),
        ({"prompt": ["x"] * 65}, "prompt", "at most 64"),
        ({"n": 3, "best_of": 2}, "best_of", "at least n"),
        ({"max_tokens": 0}, "max_tokens", "echo"),
        ({"suffix": "end"}, "suffix", "not supported"),
        ({"logprobs": True}, "logprobs", "integer"),
    ],
)
def test_a_refused_field_of_a_completion_is_named(fields: dict[str, Any], param: str, told: str) -> None:
    error = refusal(CompletionBody, {**TEXT, **fields})
    assert (error.param, told in error.message) == (param, True), error.message


@pytest.mark.parametrize("given", [None, 5, [], [5], [["a"]], [["a", "b", "c"]], {"a": 1}])
def test_texts_that_are_none_are_refused(given: Any) -> None:
    error = refusal(TextsBody, {"model": "tweets", "input": given})
    assert error.param == "input"


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8) | st.sampled_from(["user", "auto", "json_object", "text", "function", "writer", "\ud800"]),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(["role", "content", "type", "function", "name", "text", "json", "regex", "x"]), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


@pytest.fixture(scope="module")
def client(service: Service) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=service.url, timeout=20) as client:
        yield client


ROUTES: dict[str, tuple[type[Body], dict[str, Any]]] = {
    "chat/completions": (ChatBody, {**CHAT, "max_tokens": 2}),
    "completions": (CompletionBody, {**TEXT, "max_tokens": 2}),
    "classify": (TextsBody, {"model": "tweets", "input": ["good"]}),
    "translate": (TextsBody, {"model": "tweets", "input": "x"}),
}
NAMES = sorted({field.alias or name for kind, _ in ROUTES.values() for name, field in kind.model_fields.items()})


def test_no_body_makes_a_route_fail(client: httpx.Client) -> None:
    @settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=5), VALUES, min_size=1, max_size=2), st.booleans())
    def check(fields: dict[str, Any], whole: bool) -> None:
        for route, (kind, valid) in ROUTES.items():
            known = {name: value for name, value in fields.items() if name in kind.model_fields}
            body = {**valid, **(known or fields)} if whole else fields
            answer = client.post(f"/{route}", content=json.dumps(body).encode())
            assert answer.status_code in (200, 400, 404), answer.text
            if answer.status_code != 200:
                error = answer.json()["error"]
                assert error["param"] is not None
                assert error["message"]

    check()


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=40) | VALUES.map(lambda value: json.dumps(value).encode()))
def test_no_bytes_make_a_body(raw: bytes) -> None:
    with pytest.raises(ApiError) as raised:
        parse_body(raw, ChatBody)
    assert raised.value.status == 400
