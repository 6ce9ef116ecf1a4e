"""/v1/responses, asked by the real ``openai`` client. Tests that take ``base_url`` hold for any served language model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from fake_generator import BREAKS, FULL, TOO_LONG
from openai_service import Service
from pydantic import BaseModel

QUESTION = "What is the capital of France?"
WEATHER: Any = {
    "type": "function",
    "name": "get_weather",
    "description": "Tell the weather",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}


@pytest.fixture(scope="module")
def plain(service: Service) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=service.url, timeout=10) as client:
        yield client


def post(plain: httpx.Client, **fields: Any) -> httpx.Response:
    return plain.post("/responses", json={"model": "writer", "input": "Hello", **fields})


def test_a_response_is_the_chat_completion(client: openai.OpenAI, model: str) -> None:
    messages: Any = [{"role": "system", "content": "Be short."}, {"role": "user", "content": QUESTION}]
    chat = client.chat.completions.create(model=model, messages=messages, temperature=0, max_tokens=20)
    found = client.responses.create(
        model=model, instructions="Be short.", input=QUESTION, temperature=0, max_output_tokens=20
    )
    assert found.output_text == chat.choices[0].message.content
    assert found.usage is not None
    assert chat.usage is not None
    assert (found.usage.input_tokens, found.usage.output_tokens, found.usage.total_tokens) == (
        chat.usage.prompt_tokens, chat.usage.completion_tokens, chat.usage.total_tokens)  # fmt: skip
    ended = chat.choices[0].finish_reason == "stop"
    assert found.status == ("completed" if ended else "incomplete")


def test_a_stream_is_the_whole_response(client: openai.OpenAI, model: str) -> None:
    asked: Any = {"model": model, "input": QUESTION, "temperature": 0, "max_output_tokens": 20}
    whole = client.responses.create(**asked)
    events = list(client.responses.create(**asked, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [event.type for event in events][:4] == [
        "response.created", "response.in_progress", "response.output_item.added", "response.content_part.added"]  # fmt: skip
    last = events[-1]
    assert last.type in ("response.completed", "response.incomplete")
    assert last.response.output_text == whole.output_text
    assert last.response.usage == whole.usage
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == whole.output_text
    [done] = [event.text for event in events if event.type == "response.output_text.done"]
    assert done == whole.output_text
    with client.responses.stream(**asked) as stream:
        assert stream.get_final_response().output_text == whole.output_text


def test_max_output_tokens_ends_an_answer(client: openai.OpenAI, model: str) -> None:
    found = client.responses.create(model=model, input=QUESTION, temperature=0, max_output_tokens=2)
    assert found.status == "incomplete"
    assert found.incomplete_details is not None
    assert found.incomplete_details.reason == "max_output_tokens"
    assert found.usage is not None
    assert found.usage.output_tokens == 2


def test_an_answer_follows_a_schema(client: openai.OpenAI, model: str) -> None:
    class Place(BaseModel):
        city: str
        age: int

    found = client.responses.parse(model=model, input=QUESTION, text_format=Place).output_parsed
    assert found is not None
    assert isinstance(found.city, str)


def test_log_probabilities(client: openai.OpenAI, model: str) -> None:
    asked: Any = {"model": model, "input": QUESTION, "temperature": 0, "max_output_tokens": 4, "top_logprobs": 2}
    found = client.responses.create(**asked, include=["message.output_text.logprobs"])
    [part] = found.output[0].content  # type: ignore[union-attr]
    assert part.type == "output_text"
    assert "".join(token.token for token in part.logprobs or ()) == part.text
    assert all(len(token.top_logprobs) == 2 for token in part.logprobs or ())


def test_a_function_is_called_and_its_result_goes_back(plain: httpx.Client, service: Service) -> None:
    asked: dict[str, Any] = {"input": "weather?", "tools": [WEATHER]}
    whole = post(plain, **asked).json()
    text, call = whole["output"]
    assert (text["type"], text["content"][0]["text"]) == ("message", "I look it up.")
    assert (call["type"], call["name"], json.loads(call["arguments"])) == (
        "function_call",
        "get_weather",
        {"city": "Oslo"},
    )

    with openai.OpenAI(base_url=service.url, api_key="none", max_retries=0) as client:
        events = list(client.responses.create(model="writer", **asked, stream=True))
    last: Any = events[-1]
    assert [item.type for item in last.response.output] == ["message", "function_call"]
    [arguments] = [event.arguments for event in events if event.type == "response.function_call_arguments.done"]
    assert arguments == call["arguments"]

    dialog = [{"role": "user", "content": "weather?"}, *whole["output"],
              {"type": "function_call_output", "call_id": call["call_id"], "output": "sunny"}]  # fmt: skip
    assert post(plain, input=dialog, tools=[WEATHER]).status_code == 200
    sent = json.loads(service.triton.model.asked[-1].messages or "")["messages"]
    assert [message["role"] for message in sent] == ["user", "assistant", "tool"]
    assert sent[1]["content"] == "I look it up."
    assert sent[1]["tool_calls"][0]["id"] == sent[2]["tool_call_id"] == call["call_id"]
    assert sent[2]["content"] == "sunny"


def test_log_probabilities_beside_a_call_are_those_of_the_text(plain: httpx.Client, service: Service) -> None:
    asked: dict[str, Any] = {"input": "weather?", "tools": [WEATHER], "top_logprobs": 1}
    text, call = post(plain, **asked).json()["output"]
    assert "".join(token["token"] for token in text["content"][0]["logprobs"]).startswith("I look it up.")
    assert call["type"] == "function_call"
    with openai.OpenAI(base_url=service.url, api_key="none", max_retries=0) as client:
        *_, last = client.responses.create(model="writer", **asked, stream=True)
    assert [item.type for item in last.response.output] == ["message", "function_call"]  # type: ignore[union-attr]
    only = post(plain, **asked, tool_choice="required").json()["output"]
    assert [item["type"] for item in only] == ["function_call"]


def test_items_of_one_answer_are_one_message(plain: httpx.Client, service: Service) -> None:
    call = {"type": "function_call", "call_id": "c", "name": "get_weather", "arguments": "{}"}
    dialog = [{"role": "user", "content": "weather?"}, call, {"role": "assistant", "content": ""},
              {"type": "function_call_output", "call_id": "c", "output": "sunny"}]  # fmt: skip
    assert post(plain, input=dialog, tools=[WEATHER]).status_code == 200
    sent = json.loads(service.triton.model.asked[-1].messages or "")["messages"]
    assert [message["role"] for message in sent] == ["user", "assistant", "tool"]
    many = post(plain, input=[{**call, "call_id": str(i)} for i in range(200)], tools=[WEATHER])
    assert many.status_code == 400
    assert many.json()["error"]["param"] == "input"


def test_a_named_function_must_be_called(plain: httpx.Client) -> None:
    answer = post(plain, tools=[WEATHER], tool_choice={"type": "function", "name": "get_weather"}).json()
    assert [item["type"] for item in answer["output"]] == ["function_call"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": []}, "input"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
        ({"input": [{"role": "user"}]}, "input[0]"),
        ({"input": [{"role": "user", "content": "x", "output": "y"}]}, "input[0]"),
        ({"input": [{"type": "function_call", "call_id": "c", "name": "f", "arguments": "no"}]}, "input[0].arguments"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input[0].content"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"background": True}, "background"),
        ({"truncation": "auto"}, "truncation"),
        ({"reasoning": {"effort": "low"}}, "reasoning.effort"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [WEATHER, WEATHER]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "name": "other"}, "tools": [WEATHER]}, "tool_choice"),
        ({"tools": [WEATHER], "text": {"format": {"type": "json_object"}}}, "text.format"),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format"),
        ({"text": {"verbosity": "low"}}, "text.verbosity"),
        ({"stream_options": {}}, "stream_options"),
        ({"top_logprobs": 21}, "top_logprobs"),
        ({"model": "tweets"}, "model"),
        ({"input": TOO_LONG}, "prompt"),
    ],
)  # fmt: skip
def test_a_fault_names_its_field(plain: httpx.Client, fields: dict[str, Any], param: str) -> None:
    answer = post(plain, **fields)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param, answer.text


def test_null_fields_are_left_out(plain: httpx.Client) -> None:
    answer = post(plain, previous_response_id=None, reasoning={"effort": None}, text={"verbosity": None}, tools=None)
    assert answer.status_code == 200, answer.text
    assert answer.json()["text"] == {"format": {"type": "text"}}


def test_failures_are_those_of_a_chat(plain: httpx.Client) -> None:
    assert post(plain, input=FULL).status_code == 429
    lines = [line for line in post(plain, input=BREAKS, stream=True).text.splitlines() if line.startswith("data: ")]
    assert "error" in json.loads(lines[-1].removeprefix("data: "))
