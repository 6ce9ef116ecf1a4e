"""Answer /v1/responses."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from copy import deepcopy
from typing import Any

from deploykit.openai.chat import tool_call_parser
from deploykit.openai.collect_answers import Pieces, Usage, event
from deploykit.openai.logprobs import chat_logprobs
from deploykit.openai.response_request import ResponseBody, own_names
from deploykit.openai.tool_calls import ToolCall, parts_of

Event = dict[str, Any]


async def response(body: ResponseBody, pieces: Pieces) -> dict[str, Any]:
    """Return the whole response."""
    last: Event = {}
    async with aclosing(_events(body, pieces)) as events:
        async for found in events:
            last = found[-1]
    whole: dict[str, Any] = last["response"]
    return whole


async def response_events(body: ResponseBody, pieces: Pieces) -> AsyncGenerator[str, None]:
    """Yield the response as server-sent events, those of one piece together."""
    number = 0
    async with aclosing(_events(body, pieces)) as events:
        async for found in events:
            text = ""
            for one in found:
                text += f"event: {one['type']}\n" + event({**one, "sequence_number": number})
                number += 1
            yield text


async def _events(body: ResponseBody, pieces: Pieces) -> AsyncGenerator[list[Event], None]:
    """Yield the events of each piece. The last event has the whole response."""
    answer = _Answer(body)
    with own_names():
        async with aclosing(pieces):
            async for piece in pieces:
                found = [] if answer.begun else answer.begin()
                answer.usage.prompt = piece.prompt_tokens or answer.usage.prompt
                answer.usage.completion += sum(piece.tokens)
                found += answer.read(piece.texts[0], piece.finishes[0], piece.logprobs[0] if piece.logprobs else ())
                if found:
                    yield found


class _Answer:
    """The response so far: texts and calls of functions, each an item of its output."""

    def __init__(self, body: ResponseBody) -> None:
        self.usage = Usage()
        self.begun = False
        self._body = body
        self._parser = tool_call_parser(body.chat)
        self._calls = 0
        self._items: list[dict[str, Any]] = []
        self._open = False  # the last item is a message that continues
        self._tokens: list[Any] = []  # log probabilities of tokens whose text is held back
        self._response = {
            "id": _new_id("resp"),
            "object": "response",
            "created_at": int(time.time()),
            "status": "in_progress",
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "model": body.model,
            "output": [],
            "parallel_tool_calls": body.parallel_tool_calls,
            "previous_response_id": None,
            "temperature": body.temperature,
            "text": body.text.model_dump(by_alias=True, exclude_unset=True) or {"format": {"type": "text"}},
            "tool_choice": body.model_dump(include={"tool_choice"})["tool_choice"],
            "tools": [tool.model_dump() for tool in body.tools],
            "top_logprobs": body.top_logprobs or 0,
            "top_p": body.top_p,
            "truncation": "disabled",
            "background": False,
            "store": False,
            "metadata": body.metadata if isinstance(body.metadata, dict) else {},
            "usage": None,
        }

    def begin(self) -> list[Event]:
        self.begun = True
        return [{"type": f"response.{kind}", "response": dict(self._response)} for kind in ("created", "in_progress")]

    def read(self, text: str, finish: str, logprobs: Any) -> list[Event]:
        """Return the events for the new ``text``; ``finish`` is "" while the answer continues."""
        found: list[Event] = []
        if self._body.chat.logprobs:
            self._tokens += chat_logprobs(logprobs)["content"]
        for part in parts_of(self._parser, text, ended=bool(finish)):
            if isinstance(part, ToolCall):
                self._tokens = []  # those of the call, which has no place for them
                if self._body.parallel_tool_calls or not self._calls:
                    self._calls += 1
                    found += [*self._close("completed"), *self._call(part)]
            elif part:
                found += [*self._open_message(), self._add(part)]
        if finish:
            status = "incomplete" if finish == "length" else "completed"
            found += [] if self._items else self._open_message()
            if self._open and self._tokens:
                found.append(self._add(""))
            found += [*self._close(status), self._end(status)]
        return found

    @property
    def _place(self) -> dict[str, Any]:
        return {"item_id": self._items[-1]["id"], "output_index": len(self._items) - 1}

    def _open_message(self) -> list[Event]:
        if self._open:
            return []
        self._open = True
        item: dict[str, Any] = {
            "id": _new_id("msg"),
            "type": "message",
            "status": "in_progress",
            "role": "assistant",
            "content": [],
        }
        added = self._added(item)
        item["content"] = [{"type": "output_text", "text": "", "annotations": [], "logprobs": []}]
        return [
            added,
            {
                "type": "response.content_part.added",
                **self._place,
                "content_index": 0,
                "part": deepcopy(item["content"][0]),
            },
        ]

    def _add(self, text: str) -> Event:
        """Add text, and the log probabilities that wait for it."""
        [part] = self._items[-1]["content"]
        tokens, self._tokens = self._tokens, []
        part["text"] += text
        part["logprobs"] += tokens
        return {
            "type": "response.output_text.delta",
            **self._place,
            "content_index": 0,
            "delta": text,
            "logprobs": tokens,
        }

    def _close(self, status: str) -> list[Event]:
        """End the open message, if there is one."""
        if not self._open:
            return []
        self._open = False
        item, place = self._items[-1], {**self._place, "content_index": 0}
        item["status"] = status
        [part] = deepcopy(item["content"])
        return [
            {"type": "response.output_text.done", **place, "text": part["text"], "logprobs": part["logprobs"]},
            {"type": "response.content_part.done", **place, "part": part},
            self._done(),
        ]

    def _call(self, call: ToolCall) -> list[Event]:
        item = {"id": _new_id("fc"), "type": "function_call", "status": "in_progress", "call_id": call.id,
                "name": call.name, "arguments": ""}  # fmt: skip
        added = self._added(item)
        item |= {"status": "completed", "arguments": call.arguments}
        arguments = "response.function_call_arguments"
        return [
            added,
            {"type": f"{arguments}.delta", **self._place, "delta": call.arguments},
            {"type": f"{arguments}.done", **self._place, "name": call.name, "arguments": call.arguments},
            self._done(),
        ]

    def _added(self, item: dict[str, Any]) -> Event:
        self._items.append(item)
        return {"type": "response.output_item.added", "output_index": len(self._items) - 1, "item": dict(item)}

    def _done(self) -> Event:
        return {
            "type": "response.output_item.done",
            "output_index": len(self._items) - 1,
            "item": deepcopy(self._items[-1]),
        }

    def _end(self, status: str) -> Event:
        usage = self.usage.to_json()
        self._response |= {
            "status": status,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "output": self._items,
            "usage": {
                "input_tokens": usage["prompt_tokens"],
                "input_tokens_details": {"cached_tokens": 0},
                "output_tokens": usage["completion_tokens"],
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": usage["total_tokens"],
            },
        }
        return {"type": f"response.{status}", "response": self._response}


def _new_id(kind: str) -> str:
    return f"{kind}_{secrets.token_hex(12)}"
