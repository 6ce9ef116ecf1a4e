"""The body of /v1/completions.

Source: OpenAI API reference, "Create completion".
"""

from __future__ import annotations

from typing import Any

from pydantic import Field, field_validator, model_validator

from deploykit.openai.generator import GenerationRequest
from deploykit.openai.sampling_fields import MAX_ANSWERS, MAX_TOP_LOGPROBS, MOST_ID, MOST_TOKENS, GenerationBody

MAX_PROMPTS = 64


class CompletionBody(GenerationBody):
    prompt: list[str | list[int]] = Field(min_length=1, max_length=MAX_PROMPTS)
    max_tokens: int | None = Field(default=None, ge=0, le=MOST_TOKENS)
    best_of: int | None = Field(default=None, ge=1, le=MAX_ANSWERS)
    echo: bool = False
    logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)

    @field_validator("prompt", mode="before", json_schema_input_type=str | list[int] | list[str | list[int]])
    @classmethod
    def _prompts(cls, value: Any) -> Any:
        prompts = value if isinstance(value, list) and not _is_prompt(value) else [value]
        if not all(map(_is_prompt, prompts)):
            raise ValueError("the value should be a text, a list of token ids, or a list of these")
        return prompts

    @model_validator(mode="after")
    def _consistent(self) -> CompletionBody:
        if self.best_of is not None and self.best_of < self.n:
            raise ValueError("best_of: it should be at least n")
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens: 0 needs echo")
        if not all(self.prompt):
            raise ValueError("prompt: it is empty")
        return self

    def asked(self) -> list[GenerationRequest]:
        """Return the request for each prompt."""
        sampling = self.sampling()
        if self.best_of is not None:
            sampling["best_of"] = self.best_of
        if self.logprobs is not None:
            sampling["logprobs"] = self.logprobs
        if self.echo:
            sampling["echo"] = True
        return [
            GenerationRequest(
                self.model,
                sampling,
                text=prompt if isinstance(prompt, str) else None,
                ids=None if isinstance(prompt, str) else prompt,
                stream=self.stream,
                logprobs=self.logprobs is not None,
                schema_field=self.schema_field,
            )
            for prompt in self.prompt
        ]


def _is_prompt(value: Any) -> bool:
    """Return whether ``value`` is a text, or a list of at least one token id."""
    if isinstance(value, list):
        return bool(value) and all(type(item) is int and 0 <= item <= MOST_ID for item in value)
    return isinstance(value, str)
