"""Check the messages of a dialog that come from outside, before a chat template reads them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from deploykit.errors import DataError
from deploykit.text import MAX_TEXT_CHARS

ROLES = ("system", "developer", "user", "assistant", "tool")
_REMEDY = "correct the messages"


def checked_messages(value: Any) -> list[dict[str, Any]]:
    """Return messages as a chat template reads them: parts of text are joined, ``developer`` is ``system``.

    Raises DataError naming the message and its field.
    """
    if not isinstance(value, list) or not value:
        raise DataError("messages is not a list of at least one message", _REMEDY)
    messages = [_checked(message, f"messages[{i}]") for i, message in enumerate(value)]
    if (size := sum(len(message["content"]) for message in messages)) > MAX_TEXT_CHARS:
        raise DataError(f"messages have {size:,} characters, the maximum is {MAX_TEXT_CHARS:,}", "shorten them")
    if messages[-1]["role"] == "assistant":
        raise DataError("the last message is the assistant's, so there is nothing to answer", _REMEDY)
    return messages


def checked_tools(value: Any) -> list[Mapping[str, Any]] | None:
    """Return tools as a chat template reads them. Raises DataError naming the tool."""
    if value is None or value == []:
        return None
    if not isinstance(value, list):
        raise DataError("tools is not a list", "give tools as the OpenAI API describes them")
    for i, tool in enumerate(value):
        function = tool.get("function") if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise DataError(f"tools[{i}] has no function with a name", "give tools as the OpenAI API describes them")
    return value


def _checked(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise DataError(f"{where} is not an object", _REMEDY)
    role = message.get("role")
    if role not in ROLES:
        raise DataError(f"{where}.role is {role!r}", f"use one of {', '.join(ROLES)}")
    content = message.get("content")
    if isinstance(content, Sequence) and not isinstance(content, str):
        content = "".join(_text_of(part, f"{where}.content[{i}]") for i, part in enumerate(content))
    if content is None and role == "assistant" and message.get("tool_calls"):
        content = ""
    if not isinstance(content, str):
        raise DataError(f"{where}.content is not a text", _REMEDY)
    return {**message, "role": "system" if role == "developer" else role, "content": content}


def _text_of(part: Any, where: str) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind != "text" or not isinstance(part.get("text"), str):
        raise DataError(f"{where} is not a text ({kind!r})", "the model reads text only")
    return str(part["text"])
