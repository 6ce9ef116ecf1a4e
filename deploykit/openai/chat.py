"""Answer /v1/chat/completions."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable, Iterator
from contextlib import aclosing
from typing import Any

from deploykit.openai.chat_request import ChatBody
from deploykit.openai.collect_answers import DONE, Pieces, Usage, collect, event, head
from deploykit.openai.logprobs import chat_logprobs
from deploykit.openai.tool_calls import ToolCall, ToolCallParser, parts_of


async def chat_completion(body: ChatBody, pieces: Pieces) -> dict[str, Any]:
    """Return the whole response."""
    usage = Usage()
    answers = await collect(pieces, usage)
    choices = []
    for index, answer in enumerate(answers):
        text, calls = _split(body, answer.text)
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if calls:
            message["tool_calls"] = [call.to_json() for call in calls]
        choices.append(
            {
                "index": index,
                "message": message,
                "logprobs": chat_logprobs(answer.logprobs) if body.logprobs else None,
                "finish_reason": _finish(answer.finish, called=bool(calls)),
            }
        )
    return {**head("chat.completion", "chatcmpl", body.model), "choices": choices, "usage": usage.to_json()}


async def chat_events(body: ChatBody, pieces: Pieces) -> AsyncGenerator[str, None]:
    """Yield the response as server-sent events, those of one piece together."""
    top = head("chat.completion.chunk", "chatcmpl", body.model)
    usage = Usage()
    choices: list[_Choice] = []
    async with aclosing(pieces):
        async for piece in pieces:
            choices = choices or [_Choice(body, index) for index in range(len(piece.texts))]
            usage.prompt = piece.prompt_tokens or usage.prompt
            usage.completion += sum(piece.tokens)
            chunks: list[dict[str, Any]] = []
            for choice, text, finish in zip(choices, piece.texts, piece.finishes):
                chunks += choice.chunks(text, finish, piece.logprobs[choice.index] if piece.logprobs else ())
            if chunks:
                known = body.chunk_usage(usage)
                yield "".join(event({**top, "choices": [chunk], **known}) for chunk in chunks)
    if body.include_usage:
        yield event({**top, "choices": [], "usage": usage.to_json()})
    yield DONE


class _Choice:
    """One answer of a stream."""

    def __init__(self, body: ChatBody, index: int) -> None:
        self.index = index
        self._logprobs = body.logprobs
        self._parser = tool_call_parser(body)
        self._most_calls = None if body.parallel_tool_calls else 1
        self._calls = 0
        self._begun = self._ended = False

    def chunks(self, text: str, finish: str, logprobs: Iterable[Any]) -> Iterator[dict[str, Any]]:
        """Yield the chunks for the new ``text``; ``finish`` is "" while the answer continues."""
        if not self._begun:
            self._begun = True
            yield self._chunk({"role": "assistant", "content": ""})
        if self._ended:
            return
        tokens = list(logprobs)
        for part in parts_of(self._parser, text, ended=bool(finish)):
            if isinstance(part, ToolCall):
                if self._calls != self._most_calls:
                    yield self._chunk({"tool_calls": [{"index": self._calls, **part.to_json()}]})
                    self._calls += 1
            elif part or tokens:
                yield self._chunk({"content": part}, tokens)
                tokens = []
        if tokens:  # their text is held back
            yield self._chunk({"content": ""}, tokens)
        if finish:
            self._ended = True
            yield self._chunk({}, finish=_finish(finish, called=self._calls > 0))

    def _chunk(self, delta: dict[str, Any], tokens: Iterable[Any] = (), finish: str | None = None) -> dict[str, Any]:
        some = list(tokens)
        logprobs = chat_logprobs(some) if self._logprobs and some else None
        return {"index": self.index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}


def tool_call_parser(body: ChatBody) -> ToolCallParser | None:
    """Return a parser for calls of the request's tools, or None without tools."""
    functions = {tool.function.name for tool in body.offered_tools}
    return ToolCallParser(functions) if functions else None


def _split(body: ChatBody, text: str) -> tuple[str | None, list[ToolCall]]:
    """Return the text of an answer without its tool calls (None: the answer is only a call), and the calls."""
    parts = list(parts_of(tool_call_parser(body), text, ended=True))
    calls = [part for part in parts if isinstance(part, ToolCall)]
    rest = "".join(part for part in parts if isinstance(part, str))
    return (rest or None) if calls else rest, calls if body.parallel_tool_calls else calls[:1]


def _finish(finish: str, *, called: bool) -> str:
    return "tool_calls" if called and finish == "stop" else finish or "stop"
