"""Log probabilities of tokens, as OpenAI's two APIs write them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Token = Mapping[str, Any]


def chat_logprobs(tokens: Sequence[Token]) -> dict[str, Any]:
    """Return the ``logprobs`` of a chat completion's choice."""
    return {"content": [{**_entry(token), "top_logprobs": list(map(_entry, token["top"]))} for token in tokens]}


def _entry(token: Token) -> dict[str, Any]:
    text = token["token"]
    return {
        "token": text,
        "logprob": token["logprob"],
        "bytes": token["bytes"],
    }


def completion_logprobs(tokens: Iterable[Token], offset: int) -> dict[str, Any]:
    """Return the ``logprobs`` of a completion's choice; ``offset``: the characters of the text before them."""
    found: dict[str, Any] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for token in tokens:
        found["tokens"].append(token["token"])
        found["token_logprobs"].append(token["logprob"])
        found["top_logprobs"].append({top["token"]: top["logprob"] for top in token["top"]} or None)
        found["text_offset"].append(offset)
        offset += len(token["token"])
    return found
