"""Log probabilities of tokens, as OpenAI's two APIs write them."""

from __future__ import annotations

import codecs
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


class CompletionLogprobs:
    """The ``logprobs`` of a completion's choice, whose tokens may come in parts."""

    def __init__(self) -> None:
        self._characters = 0  # of the tokens before, without the bytes of one that is not complete
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, tokens: Iterable[Token]) -> dict[str, Any]:
        """Return the ``logprobs`` of the next tokens. ``text_offset`` is the place in the text of a token's first character."""
        found: dict[str, Any] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token in tokens:
            found["tokens"].append(_name(token))
            found["token_logprobs"].append(token["logprob"])
            found["top_logprobs"].append(_by_name(token["top"]) or None)
            found["text_offset"].append(self._characters)
            self._characters += len(self._utf8.decode(bytes(token["bytes"])))
        return found


def _name(token: Token) -> str:
    """Return the token's text; of a part of a character its bytes, as OpenAI writes them: all such texts are U+FFFD."""
    data = bytes(token["bytes"])
    try:
        data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
    return str(token["token"])


def _by_name(top: Iterable[Token]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for token in top:  # the likeliest first; tokens of one text may differ in their ids
        found.setdefault(_name(token), token["logprob"])
    return found
