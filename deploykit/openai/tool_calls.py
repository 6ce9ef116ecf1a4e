"""Find tool calls in an answer: ``<tool_call>{json}</tool_call>``, or an answer that is only JSON.

The first form is that of Hermes, Qwen and SmolLM; the second that of Llama 3, and of answers held to a schema.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
_KEYS = {"name", "arguments", "parameters", "id", "type"}


@dataclass(frozen=True)
class ToolCall:
    """A call of the function ``name``; ``arguments`` is a JSON object."""

    name: str
    arguments: str
    id: str = field(default_factory=lambda: f"call_{secrets.token_hex(12)}")

    def to_json(self) -> dict[str, Any]:
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


class ToolCallParser:
    """Split the pieces of one answer into text and calls of ``functions``.

    Text that is not a call of these functions stays text. Texts and calls do not depend on where the pieces are cut.
    """

    def __init__(self, functions: Collection[str]) -> None:
        self._functions = functions
        self._held = ""
        self._opening = ""  # the tag of the call being read, and the white space before it
        self._where: Literal["start", "text", "call", "json"] = "start"
        self._called = False

    def feed(self, text: str) -> Iterator[str | ToolCall]:
        """Yield the parts that are final after the next piece of the answer."""
        self._held += text
        while True:
            if self._where == "start":
                first = self._held.lstrip()[:1]
                if not first:
                    return
                self._where = "json" if first in "{[" else "text"
            elif self._where == "text":
                before, tag, after = self._held.partition(_OPEN)
                if tag:
                    certain = len(before.rstrip())
                    if certain:
                        yield before[:certain]
                    self._opening = before[certain:] + tag
                    self._held, self._where = after, "call"
                    continue
                certain = _certain(self._held)
                if certain:
                    yield self._held[:certain]
                    self._held = self._held[certain:]
                return
            elif self._where == "call":
                inner, tag, after = self._held.partition(_CLOSE)
                if not tag:
                    return
                yield from self._calls(inner) or [self._opening + inner + tag]
                self._held, self._where = after, "text"
            else:
                return

    def finish(self) -> Iterator[str | ToolCall]:
        """Yield the rest, when the answer is complete."""
        if self._where == "json":
            yield from self._calls(self._held) or [self._held]
        elif self._where == "call":
            yield from self._calls(self._held) or [self._opening + self._held]
        elif self._held and not (self._called and self._held.isspace()):
            yield self._held
        self._held = ""

    def _calls(self, text: str) -> Sequence[str | ToolCall]:
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            return []
        calls = [self._call(item) for item in (found if isinstance(found, list) else [found])]
        whole = [call for call in calls if call is not None]
        if len(whole) < len(calls):
            return []
        self._called = self._called or bool(whole)
        return whole

    def _call(self, item: Any) -> ToolCall | None:
        if not isinstance(item, dict) or not item.keys() <= _KEYS or item.get("name") not in self._functions:
            return None
        arguments = item.get("arguments", item.get("parameters", {}))
        if not isinstance(arguments, dict):
            return None
        return ToolCall(item["name"], json.dumps(arguments, ensure_ascii=False))


def parts_of(parser: ToolCallParser | None, text: str, *, ended: bool) -> Iterator[str | ToolCall]:
    """Yield the parts that are final after ``text``, the next piece of an answer; ``ended``: it is the last one. Without a
    parser the text is the only part."""
    if parser is None:
        yield text
        return
    yield from parser.feed(text)
    if ended:
        yield from parser.finish()


def _certain(text: str) -> int:
    """Return how many characters of ``text`` cannot belong to an opening tag or to the white space before one."""
    tag = next((n for n in range(min(len(_OPEN) - 1, len(text)), 0, -1) if text.endswith(_OPEN[:n])), 0)
    return len(text[: len(text) - tag].rstrip())
