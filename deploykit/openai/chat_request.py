"""The body of /v1/chat/completions: messages, tools and the rest.

Source: OpenAI API reference, "Create chat completion".
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from deploykit.openai.generator import GenerationRequest
from deploykit.openai.read_body import Body
from deploykit.openai.sampling_fields import MAX_TOP_LOGPROBS, MOST_TOKENS, GenerationBody
from deploykit.openai.structured import tool_call_schema

MAX_MESSAGES = 2048
MAX_TOOLS = 128


def _json_object(value: str) -> str:
    try:
        found = json.loads(value)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise ValueError("the value should be a JSON object in a string")
    return value


FunctionName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
Arguments = Annotated[str, AfterValidator(_json_object)]


class CalledFunction(Body):
    name: FunctionName
    arguments: Arguments


class CalledTool(Body):
    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class TextPart(Body):
    type: Literal["text"]
    text: str


def joined_parts(value: Any, fields: Mapping[str, str]) -> Any:
    """Join the parts of a content that is a list. Only text is read: ``fields`` has the field of it for each type of part. The first
    type is named in errors."""
    if not isinstance(value, list):
        return value
    texts = []
    for index, part in enumerate(value):
        kind = part.get("type") if isinstance(part, dict) else None
        field = fields.get(kind) if isinstance(kind, str) else None
        text = part.get(field) if field else None
        if not isinstance(text, str):
            shown = kind if isinstance(kind, str) and not field else "something else"
            wanted = next(iter(fields))
            message = (
                f"part {{index}} should be {{type: {wanted}, text: …}}, it is {{shown}}: the model reads only text"
            )
            raise PydanticCustomError("content_part", message, {"index": index, "shown": shown[:40]})
        texts.append(text)
    return "".join(texts)


class Message(Body):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | None = None
    name: str | None = None
    tool_calls: list[CalledTool] | None = Field(default=None, min_length=1, max_length=MAX_TOOLS)
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    refusal: str | None = None

    @field_validator("content", mode="before", json_schema_input_type=str | list[TextPart] | None)
    @classmethod
    def _text(cls, value: Any) -> Any:
        return joined_parts(value, {"text": "text"})

    @model_validator(mode="after")
    def _complete(self) -> Message:
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            raise ValueError("content is missing")
        if self.tool_calls and self.role != "assistant":
            raise ValueError(f"tool_calls is for the role assistant, not {self.role}")
        return self

    def for_template(self) -> dict[str, Any]:
        """Return the message as chat templates read it: the arguments of a call are an object, not a string."""
        found = self.model_dump(exclude_none=True, exclude={"refusal"})
        if self.role == "developer":  # OpenAI's newer name; templates know only the older one
            found["role"] = "system"
        for call in found.get("tool_calls", ()):
            call["function"]["arguments"] = json.loads(call["function"]["arguments"])
        return {"content": "", **found}


class Function(Body):
    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] = Field(default_factory=dict)
    strict: bool | None = None


class OfFunction(Body):
    type: Literal["function"]


class Tool(OfFunction):
    function: Function


class NamedFunction(Body):
    name: str


class NamedTool(OfFunction):
    function: NamedFunction


def tool_choice(value: Any, named: type[Body]) -> Any:
    """Return a value of the field ``tool_choice``: a word, or an object, read as ``named``.

    Raises ValueError for any other value, because pydantic would name the faults of each alternative.
    """
    if isinstance(value, dict | named):
        return named.model_validate(value)
    if value not in ("none", "auto", "required"):
        raise ValueError('the value should be "none", "auto", "required", or an object with a function\'s name')
    return value


class ChatBody(GenerationBody):
    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_completion_tokens: int | None = Field(default=None, ge=1, le=MOST_TOKENS)
    logprobs: bool = False
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)
    tools: list[Tool] | None = Field(default=None, max_length=MAX_TOOLS)
    tool_choice: NamedTool | Literal["none", "auto", "required"] | None = None
    parallel_tool_calls: bool = True
    modalities: list[Literal["text"]] | None = None

    @field_validator("tool_choice", mode="before")
    @classmethod
    def _choice(cls, value: Any) -> Any:
        return tool_choice(value, NamedTool)

    @model_validator(mode="after")
    def _consistent(self) -> ChatBody:
        most = self.max_completion_tokens
        if most is not None and self.max_tokens not in (None, most):
            raise ValueError("max_tokens: it differs from max_completion_tokens; give one of them")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs: give it only with logprobs true")
        names = [tool.function.name for tool in self.tools or ()]
        if len(set(names)) < len(names):
            raise ValueError("tools: two functions have the same name")
        if not names and self.tool_choice not in (None, "none", "auto"):
            raise ValueError("tool_choice: there are no tools to choose from")
        if isinstance(self.tool_choice, NamedTool) and self.tool_choice.function.name not in names:
            raise ValueError("tool_choice: tools has no function of that name")
        formatted = self.structured_outputs or (self.response_format and self.response_format.type != "text")
        if formatted and self.offered_tools:
            raise ValueError('response_format: it would prevent tool calls; leave it out, or set tool_choice to "none"')
        return self

    @property
    def offered_tools(self) -> list[Tool]:
        """The tools that the model may call."""
        return [] if self.tool_choice == "none" else self.tools or []

    @property
    def _must_call(self) -> bool:
        return self.tool_choice == "required" or isinstance(self.tool_choice, NamedTool)

    @property
    def schema_field(self) -> str:
        return "tools" if self._must_call else super().schema_field

    def asked(self) -> GenerationRequest:
        """Return the request for the model."""
        sampling = self.sampling()
        if self.max_completion_tokens is not None:
            sampling["max_new_tokens"] = self.max_completion_tokens
        if self.logprobs:
            sampling["logprobs"] = self.top_logprobs or 0
        tools = self.offered_tools
        if self._must_call:
            wanted = self.tool_choice.function.name if isinstance(self.tool_choice, NamedTool) else None
            callable_ = [t.function for t in tools if wanted in (None, t.function.name)]
            sampling["json_schema"] = tool_call_schema([(f.name, f.parameters) for f in callable_])
        messages: Any = [message.for_template() for message in self.messages]
        if tools:
            offered = [tool.model_dump(exclude_none=True) for tool in tools]
            messages = {"messages": messages, "tools": offered}
        return GenerationRequest(
            self.model,
            sampling,
            messages=json.dumps(messages, ensure_ascii=False),
            stream=self.stream,
            logprobs=self.logprobs,
            schema_field=self.schema_field,
        )
