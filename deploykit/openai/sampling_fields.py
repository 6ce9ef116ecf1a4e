"""The fields that both kinds of completions have, and the sampling parameters that they become."""

from __future__ import annotations

import secrets
from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator

from deploykit.openai.collect_answers import Usage
from deploykit.openai.read_body import Body
from deploykit.openai.structured import ResponseFormat, StructuredOutputs

MAX_ANSWERS = 16
MAX_STOPS = 16
MAX_STOP_CHARS = 1000
MAX_TOP_LOGPROBS = 20
MAX_BIASES = 1024
MOST_TOKENS = 1_000_000
MOST_ID = 2**31 - 1

TokenId = Annotated[int, Field(ge=0, le=MOST_ID)]

_SAMPLING = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "typical_p": "typical_p",
    "repetition_penalty": "repetition_penalty",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
    "logit_bias": "logit_bias",
    "seed": "seed",
    "stop": "stop",
    "stop_token_ids": "stop_token_ids",
    "n": "n",
    "max_tokens": "max_new_tokens",
    "min_tokens": "min_new_tokens",
    "ignore_eos": "ignore_eos",
}
FIELD_OF = {ours: theirs for theirs, ours in _SAMPLING.items()} | {
    "text_input": "prompt",
    "input_ids": "prompt",
    "messages": "messages",
    "tools": "tools",
    "regex": "structured_outputs.regex",
    "choice": "structured_outputs.choice",
    "grammar": "structured_outputs.grammar",
}
"""Names in the model's errors -> names of the request's fields."""


class StreamOptions(Body):
    include_usage: bool = False
    continuous_usage_stats: bool = False  # vLLM's, which load generators ask for
    include_obfuscation: bool = False


class WithoutEffect(Body):
    """Fields of OpenAI's API that have no effect here."""

    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None


class GenerationBody(WithoutEffect):
    """Fields of OpenAI's API, then those of vLLM's."""

    model: str = Field(min_length=1, max_length=256)
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(default=None, ge=1, le=MOST_TOKENS)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = Field(default=None, max_length=MAX_BIASES)
    seed: int | None = Field(default=None, ge=0, le=2**63 - 1)
    stop: list[Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]] | None = Field(
        default=None, max_length=MAX_STOPS
    )
    n: int = Field(default=1, ge=1, le=MAX_ANSWERS)
    response_format: ResponseFormat | None = None

    top_k: int | None = Field(default=None, ge=0, le=MOST_ID)
    min_p: float | None = Field(default=None, ge=0, le=1)
    typical_p: float | None = Field(default=None, gt=0, le=1)
    repetition_penalty: float | None = Field(default=None, ge=0.01, le=100)
    min_tokens: int | None = Field(default=None, ge=0, le=MOST_TOKENS)
    stop_token_ids: list[TokenId] | None = Field(default=None, max_length=MAX_STOPS)
    ignore_eos: bool | None = None
    structured_outputs: StructuredOutputs | None = None

    @field_validator("stop", mode="before", json_schema_input_type=str | list[str] | None)
    @classmethod
    def _one_stop(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("logit_bias")
    @classmethod
    def _token_ids(cls, value: dict[str, float] | None) -> dict[str, float] | None:
        for name in value or ():
            if not (name.isascii() and name.isdigit() and len(name) <= 10 and int(name) <= MOST_ID):
                raise ValueError("the names should be token ids: whole numbers, 0 or more")
        return value

    @model_validator(mode="after")
    def _fitting(self) -> GenerationBody:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: give it only with stream")
        if self.structured_outputs and self.response_format and self.response_format.type != "text":
            raise ValueError("structured_outputs: give it or response_format, not both")
        return self

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def chunk_usage(self, usage: Usage) -> dict[str, Any]:
        """Return the field ``usage`` of a chunk with a part of the answer, if it has one: null, or the tokens so far."""
        if not self.include_usage:
            return {}
        assert self.stream_options is not None
        return {"usage": usage.to_json() if self.stream_options.continuous_usage_stats else None}

    @property
    def schema_field(self) -> str:
        """The field that has the JSON schema of the answer."""
        return "structured_outputs.json" if self.structured_outputs else "response_format"

    def sampling(self) -> dict[str, Any]:
        """Return the given fields under deploykit's names; missing fields take the model's own values, except the seed."""
        given = {ours: getattr(self, theirs) for theirs, ours in _SAMPLING.items()}
        if self.seed is None:  # so that a repeated request gets another answer
            given["seed"] = secrets.randbelow(2**32)
        format = self.structured_outputs or self.response_format
        constraint = format.constraint() if format is not None else {}
        return {**{name: value for name, value in given.items() if value is not None}, **constraint}
