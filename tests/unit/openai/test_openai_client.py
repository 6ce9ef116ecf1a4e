"""The real ``openai`` client. These tests hold for any served language model: see ``base_url``."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest

MESSAGES: Any = [{"role": "user", "content": "What is the capital of France?"}]
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Tell the weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


def test_a_chat_streamed_is_the_chat_not_streamed(client: openai.OpenAI, model: str) -> None:
    options: Any = {"model": model, "messages": MESSAGES, "temperature": 0, "max_tokens": 20}
    whole = client.chat.completions.create(**options)
    chunks = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))

    assert whole.choices[0].message.content
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole.choices[0].message.content
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == whole.choices[0].finish_reason
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert whole.usage is not None
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    assert chunks[0].choices[0].delta.role == "assistant"
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_completion_streamed_is_the_completion_not_streamed(client: openai.OpenAI, model: str) -> None:
    options: Any = {"model": model, "prompt": ["One.", "Two two."], "temperature": 0, "max_tokens": 8, "echo": True}
    whole = client.completions.create(**options)
    streamed = {0: "", 1: ""}
    for chunk in client.completions.create(**options, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == {choice.index: choice.text for choice in whole.choices}
    assert whole.choices[1].text.startswith("Two two.")


def test_usage_may_be_in_every_chunk(client: openai.OpenAI, model: str) -> None:
    """As guidellm asks for it."""
    options: Any = {"include_usage": True, "continuous_usage_stats": True}
    asked: Any = {"model": model, "max_tokens": 4, "stream": True, "stream_options": options}
    for chunks in (
        list(client.completions.create(prompt="Say", **asked)),
        list(client.chat.completions.create(messages=MESSAGES, **asked)),
    ):
        counts = [chunk.usage.completion_tokens for chunk in chunks if chunk.usage is not None]
        assert len(counts) == len(chunks)
        assert counts == sorted(counts)
        assert counts[0] <= counts[-1] <= 4


def test_max_tokens_ends_an_answer(client: openai.OpenAI, model: str) -> None:
    for name in ("max_tokens", "max_completion_tokens"):
        options: Any = {name: 2}
        answer = client.chat.completions.create(model=model, messages=MESSAGES, temperature=0, **options)
        assert answer.choices[0].finish_reason == "length"
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 2


def test_a_stop_string_is_cut_off(client: openai.OpenAI, model: str) -> None:
    options: Any = {"model": model, "prompt": "Say", "temperature": 0, "max_tokens": 20}
    text = client.completions.create(**options).choices[0].text
    stop = text[len(text) // 2 :][:2]
    stopped = client.completions.create(**options, stop=stop).choices[0]
    assert stopped.text == text[: text.index(stop)]
    assert stopped.finish_reason == "stop"


def test_the_same_seed_gives_the_same_answers_and_n_of_them(client: openai.OpenAI, model: str) -> None:
    options: Any = {"model": model, "messages": MESSAGES, "temperature": 1, "max_tokens": 12, "n": 3}
    first, again, other = (client.chat.completions.create(**options, seed=seed).choices for seed in (7, 7, 8))
    assert [choice.index for choice in first] == [0, 1, 2]
    assert [c.message.content for c in first] == [c.message.content for c in again]
    assert [c.message.content for c in first] != [c.message.content for c in other]


def test_log_probabilities_of_a_chat(client: openai.OpenAI, model: str) -> None:
    options: Any = {"model": model, "messages": MESSAGES, "temperature": 0, "max_tokens": 4, "logprobs": True}
    choice = client.chat.completions.create(**options, top_logprobs=2).choices[0]
    assert choice.logprobs is not None
    tokens = choice.logprobs.content or []
    assert bytes(b for token in tokens for b in token.bytes or ()).decode() == choice.message.content
    assert all(token.logprob <= 0 and len(token.top_logprobs) == 2 for token in tokens)
    chunks = client.chat.completions.create(**options, top_logprobs=2, stream=True)
    streamed = [t for c in chunks if c.choices[0].logprobs for t in c.choices[0].logprobs.content or ()]
    assert streamed == tokens


def test_log_probabilities_of_a_prompt(client: openai.OpenAI, model: str) -> None:
    answer = client.completions.create(model=model, prompt="A long day", echo=True, logprobs=1, max_tokens=2)
    choice = answer.choices[0]
    assert choice.logprobs is not None
    assert choice.logprobs.tokens is not None
    assert choice.logprobs.token_logprobs is not None
    assert choice.logprobs.text_offset is not None
    assert choice.logprobs.token_logprobs[0] is None
    assert "".join(choice.logprobs.tokens) == choice.text
    assert choice.text.startswith("A long day")
    assert choice.logprobs.text_offset[1] == len(choice.logprobs.tokens[0])


def test_best_of_returns_the_best(client: openai.OpenAI, model: str) -> None:
    answer = client.completions.create(model=model, prompt="Say", temperature=1, seed=3, best_of=4, n=2, max_tokens=12)
    assert len(answer.choices) == 2
    assert answer.usage is not None
    assert answer.usage.completion_tokens > 2


def test_an_answer_follows_a_json_schema(client: openai.OpenAI, model: str) -> None:
    schema = {"type": "object", "properties": {"city": {"type": "string"}, "age": {"type": "integer"}},
              "required": ["city", "age"], "additionalProperties": False}  # fmt: skip
    format: Any = {"type": "json_schema", "json_schema": {"name": "place", "schema": schema, "strict": True}}
    answer = client.chat.completions.create(model=model, messages=MESSAGES, response_format=format)
    found = json.loads(answer.choices[0].message.content or "")
    assert isinstance(found["city"], str)
    assert isinstance(found["age"], int)
    any_object = client.chat.completions.create(model=model, messages=MESSAGES, response_format={"type": "json_object"})
    assert isinstance(json.loads(any_object.choices[0].message.content or ""), dict)


def test_an_answer_is_one_of_the_choices(client: openai.OpenAI, model: str) -> None:
    extra = {"structured_outputs": {"choice": ["red", "blue"]}}
    answer = client.completions.create(model=model, prompt="A colour:", extra_body=extra)
    assert answer.choices[0].text in ("red", "blue")


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
def test_a_tool_is_called_when_it_must_be(client: openai.OpenAI, model: str, choice: Any) -> None:
    options: Any = {"model": model, "messages": MESSAGES, "tools": [WEATHER], "tool_choice": choice}
    answer = client.chat.completions.create(**options).choices[0]
    assert answer.finish_reason == "tool_calls"
    assert answer.message.tool_calls is not None
    (call,) = answer.message.tool_calls
    assert call.type == "function"
    assert call.function.name == "get_weather"
    assert isinstance(json.loads(call.function.arguments)["city"], str)

    with client.chat.completions.stream(**options) as stream:
        final = stream.get_final_completion().choices[0]
    assert final.finish_reason == "tool_calls"
    assert final.message.tool_calls is not None
    assert [c.function.name for c in final.message.tool_calls] == ["get_weather"]


def test_the_answer_of_a_tool_goes_back(client: openai.OpenAI, model: str) -> None:
    first = client.chat.completions.create(
        model=model, messages=MESSAGES, tools=[WEATHER], tool_choice="required"
    ).choices[0].message  # fmt: skip
    assert first.tool_calls is not None
    result: Any = {"role": "tool", "tool_call_id": first.tool_calls[0].id, "content": "Sunny"}
    messages: Any = [*MESSAGES, first, result]
    answer = client.chat.completions.create(model=model, messages=messages, tools=[WEATHER], max_tokens=8)
    assert answer.usage is not None
    assert answer.usage.completion_tokens > 0


def test_the_model_is_listed(client: openai.OpenAI, model: str) -> None:
    assert model in [each.id for each in client.models.list()]
    assert client.models.retrieve(model).id == model
    with pytest.raises(openai.NotFoundError, match="no-such"):
        client.models.retrieve("no-such")


def test_errors_are_those_of_the_api(client: openai.OpenAI, model: str) -> None:
    with pytest.raises(openai.NotFoundError) as unknown:
        client.chat.completions.create(model="no-such", messages=MESSAGES)
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model=model, messages=MESSAGES, temperature=-1)
    assert refused.value.param == "temperature"
    assert refused.value.type == "invalid_request_error"
