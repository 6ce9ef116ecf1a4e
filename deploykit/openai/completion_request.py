"""The body of /v1/completions.

Source: OpenAI API reference, "Create completion".
"""

from __future__ import annotations

from typing import Any

from pydantic import Field, field_validator, model_validator

from deploykit.openai.generator import Asked
from deploykit.openai.sampling_fields import MAX_ANSWERS, MAX_TOP_LOGPROBS, MOST_TOKENS, GenerationBody

MAX_PROMPTS = 64


class CompletionBody(GenerationBody):
    prompt: list[str] = Field(min_length=1, max_length=MAX_PROMPTS)
    max_tokens: int | None = Field(default=None, ge=0, le=MOST_TOKENS)
    best_of: int | None = Field(default=None, ge=1, le=MAX_ANSWERS)
    echo: bool = False
    logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)

    @field_validator("prompt", mode="before")
    @classmethod
    def _texts(cls, value: Any) -> Any:
        if isinstance(value, list) and any(isinstance(item, int | list) for item in value):
            raise ValueError("token ids are not accepted; the value should be a string or a list of strings")
        return [value] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _consistent(self) -> CompletionBody:
        if self.best_of is not None and self.best_of < self.n:
            raise ValueError("best_of: it should be at least n")
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens: 0 needs echo")
        if "" in self.prompt:
            raise ValueError("prompt: it is empty")
        return self

    def asked(self) -> list[Asked]:
        """Return the request for each prompt."""
        sampling = self.sampling()
        if self.best_of is not None:
            sampling["best_of"] = self.best_of
        if self.logprobs is not None:
            sampling["logprobs"] = self.logprobs
            if self.echo:
                sampling["echo"] = True
        return [
            Asked(
                self.model,
                sampling,
                text=prompt,
                stream=self.stream,
                logprobs=self.logprobs is not None,
            )
            for prompt in self.prompt
        ]
