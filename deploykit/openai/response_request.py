"""Read the body of /v1/responses as a chat completion with one answer.

Source: OpenAI API reference, "Create a model response". Nothing is stored, so each request has the whole dialog.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, Literal

from pydantic import Field, PrivateAttr, ValidationError, field_validator, model_validator

from deploykit.openai.chat_request import (
    MAX_MESSAGES,
    MAX_TOOLS,
    Arguments,
    ChatBody,
    Function,
    FunctionName,
    NamedFunction,
    NamedTool,
    OfFunction,
    Tool,
    joined_parts,
    tool_choice,
)
from deploykit.openai.errors import ApiError
from deploykit.openai.read_body import Body
from deploykit.openai.sampling_fields import MAX_TOP_LOGPROBS, MOST_TOKENS, WithoutEffect
from deploykit.openai.structured import JsonSchema

_FIELDS = {"messages": "input", "max_tokens": "max_output_tokens", "response_format": "text.format"}
"""Names of fields in a chat completion -> names here."""
_LOGPROBS = "message.output_text.logprobs"
_PARTS = {"input_text": "text", "output_text": "text", "text": "text", "refusal": "refusal"}
_OF_KIND = {
    "message": ("role", "content"),
    "function_call": ("call_id", "name", "arguments"),
    "function_call_output": ("call_id", "output"),
}
"""The fields of each type of item."""
_OF_ALL_KINDS = ("type", "id", "status", "phase")


class Item(Body):
    """An item of the dialog: a message, a call that the model made, or the result of a call. The last fields have no effect: they
    come from an earlier response."""

    type: Literal["message", "function_call", "function_call_output"] = "message"
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: str | None = None
    call_id: str | None = None
    name: FunctionName | None = None
    arguments: Arguments | None = None
    output: str | None = None

    id: str | None = None
    status: Any = None
    phase: Any = None

    @field_validator("content", "output", mode="before", json_schema_input_type=str | list[dict[str, Any]] | None)
    @classmethod
    def _text(cls, value: Any) -> Any:
        return joined_parts(value, _PARTS)

    @model_validator(mode="after")
    def _complete(self) -> Item:
        given, wanted = self.model_fields_set, _OF_KIND[self.type]  # without nulls, which were dropped
        for name in wanted:
            if name not in given:
                raise ValueError(f"{name} is missing in a {self.type}")
        for name in type(self).model_fields:
            if name in given and name not in wanted and name not in _OF_ALL_KINDS:
                raise ValueError(f"{name} is not a field of a {self.type}")
        return self

    def message(self) -> dict[str, Any]:
        """Return the message of a chat completion."""
        if self.type == "function_call":
            function = {"name": self.name, "arguments": self.arguments}
            return {"role": "assistant", "tool_calls": [{"id": self.call_id, "function": function}]}
        if self.type == "function_call_output":
            return {"role": "tool", "tool_call_id": self.call_id, "content": self.output}
        return {"role": self.role, "content": self.content}


class FunctionTool(Function, OfFunction):
    pass


class NamedFunctionTool(NamedFunction, OfFunction):
    pass


class TextFormat(JsonSchema):
    type: Literal["text", "json_object", "json_schema"] = "text"

    @model_validator(mode="after")
    def _with_schema(self) -> TextFormat:
        if (self.type == "json_schema") != ("schema_" in self.model_fields_set):
            raise ValueError("schema and the type json_schema go together")
        return self


class TextOptions(Body):
    format: TextFormat = TextFormat()


class Reasoning(Body):
    """No field is supported, because no model separates reasoning from its answer."""


class ResponseStreamOptions(Body):
    include_obfuscation: bool = False


class ResponseBody(WithoutEffect):
    """Fields of OpenAI's API."""

    model: str = Field(min_length=1, max_length=256)
    input: list[Item] = Field(min_length=1, max_length=MAX_MESSAGES - 1)
    instructions: str | None = None
    max_output_tokens: int | None = Field(default=None, ge=1, le=MOST_TOKENS)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)
    text: TextOptions = TextOptions()
    tools: list[FunctionTool] = Field(default=[], max_length=MAX_TOOLS)
    tool_choice: NamedFunctionTool | Literal["none", "auto", "required"] = "auto"
    parallel_tool_calls: bool = True
    stream: bool = False
    stream_options: ResponseStreamOptions | None = None
    include: list[Literal["message.output_text.logprobs", "reasoning.encrypted_content"]] = Field(default=[])
    reasoning: Reasoning | None = None
    truncation: Literal["disabled"] = "disabled"
    background: Literal[False] = False

    _chat: ChatBody = PrivateAttr()

    @field_validator("input", mode="before", json_schema_input_type=str | list[Item])
    @classmethod
    def _one_text(cls, value: Any) -> Any:
        return [{"role": "user", "content": value}] if isinstance(value, str) else value

    @field_validator("tool_choice", mode="before")
    @classmethod
    def _choice(cls, value: Any) -> Any:
        return tool_choice(value, NamedFunctionTool)

    @model_validator(mode="after")
    def _consistent(self) -> ResponseBody:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: give it only with stream")
        try:
            self._chat = self._as_chat()
        except ValidationError as error:
            fault = error.errors(include_url=False, include_input=False)[0]
            message = fault["msg"].removeprefix("Value error, ")
            raise ValueError(f"input: {message}" if fault["loc"] else _renamed(message)) from None
        return self

    @property
    def chat(self) -> ChatBody:
        """The same request as a chat completion."""
        return self._chat

    def _as_chat(self) -> ChatBody:
        messages: list[dict[str, Any]] = []
        if self.instructions is not None:
            messages.append({"role": "system", "content": self.instructions})
        for item in self.input:
            message, before = item.message(), messages[-1] if messages else {}
            calls = [*before.get("tool_calls", ()), *message.get("tool_calls", ())]
            if calls and before.get("role") == message["role"] == "assistant":  # items of the same answer
                text = (before.get("content") or "") + (message.get("content") or "")
                before |= {"content": text, "tool_calls": calls}
            else:
                messages.append(message)
        wanted = {
            "model": self.model,
            "messages": messages,
            "max_completion_tokens": self.max_output_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "logprobs": _LOGPROBS in self.include or self.top_logprobs is not None,
            "top_logprobs": self.top_logprobs,
            "response_format": self._format(),
            # pydantic does not validate models again. Messages are new ones: 31 µs for 20, and 68 with model_construct.
            "tools": [Tool.model_construct(type="function", function=tool) for tool in self.tools] or None,
            "tool_choice": NamedTool.model_construct(type="function", function=self.tool_choice)
            if isinstance(self.tool_choice, NamedFunctionTool)
            else self.tool_choice,
            "parallel_tool_calls": self.parallel_tool_calls,
            "stream": self.stream,
        }
        return ChatBody.model_validate(wanted)

    def _format(self) -> dict[str, Any]:
        found = self.text.format
        schema = found.model_dump(exclude={"type"}, by_alias=True) if found.type == "json_schema" else None
        return {"type": found.type, "json_schema": schema}


def _renamed(message: str) -> str:
    name, colon, rest = message.partition(":")
    return _FIELDS.get(name, name) + colon + rest


@contextmanager
def own_names() -> Generator[None]:
    """Rename the fields in an ApiError of a chat completion to those of this API."""
    try:
        yield
    except ApiError as error:
        error.message = _renamed(error.message)
        error.param = _FIELDS.get(error.param or "", error.param)
        raise
