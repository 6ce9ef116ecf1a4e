"""Define the interface between the routes and the language models."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True)
class GenerationRequest:
    """A prompt for ``model``: a ``text``, token ``ids``, or ``messages`` as JSON (the others are None).

    ``sampling`` has deploykit's names; with its ``echo`` an answer begins with the prompt. ``stream``: send each new
    piece of text. ``logprobs``: send the log-probabilities of the tokens. ``schema_field``: the request's field with the JSON schema.
    """

    model: str
    sampling: Mapping[str, Any]
    text: str | None = None
    messages: str | None = None
    stream: bool = False
    logprobs: bool = False
    ids: Sequence[int] | None = None
    schema_field: str = "response_format"


@dataclass(frozen=True)
class Piece:
    """A response of the model: the new part of each of the n answers.

    ``finishes`` are "stop", "length" or "" while an answer continues. ``logprobs`` has a list of tokens per answer, each
    ``{"token", "token_id", "bytes", "logprob", "top"}``; it is empty unless requested. ``tokens``
    counts the new tokens of each answer.
    """

    texts: Sequence[str]
    finishes: Sequence[str]
    prompt_tokens: int
    tokens: Sequence[int]
    logprobs: Sequence[Sequence[Mapping[str, Any]]] = ()


class Generator(Protocol):
    """Language models that answer prompts. Closing the generator of pieces cancels the request at once."""

    def generate(self, asked: GenerationRequest) -> AsyncGenerator[Piece, None]:
        """Yield the pieces of the answers: one if they are not streamed.

        Raises ApiError: status 400 naming the field, 429 if the queue is full, 503 with ``restarting`` if the model was
        lost.
        """

    async def ready(self) -> bool:
        """Return whether the models answer."""

    async def close(self) -> None:
        """Close the connection."""
