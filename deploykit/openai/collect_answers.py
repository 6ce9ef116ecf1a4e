"""Collect pieces into complete answers, and count tokens for ``usage``."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from deploykit.openai.generator import Piece

DONE = "data: [DONE]\n\n"


@dataclass
class Answer:
    """One answer so far. ``finish`` is "" while it continues."""

    text: str = ""
    finish: str = ""
    tokens: int = 0
    logprobs: list[Any] = field(default_factory=list)


@dataclass
class Usage:
    prompt: int = 0
    completion: int = 0

    def to_json(self) -> dict[str, int]:
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
        }


Pieces = AsyncGenerator[Piece, None]


async def collect(pieces: Pieces, usage: Usage) -> list[Answer]:
    """Return the whole answers to one prompt, and add their tokens to ``usage``."""
    answers: list[Answer] = []
    prompt = 0
    async with aclosing(pieces):
        async for piece in pieces:
            answers = answers or [Answer() for _ in piece.texts]
            prompt = piece.prompt_tokens or prompt
            for index, answer in enumerate(answers):
                answer.text += piece.texts[index]
                answer.finish = piece.finishes[index] or answer.finish
                answer.tokens += piece.tokens[index]
                if piece.logprobs:
                    answer.logprobs += piece.logprobs[index]
    usage.prompt += prompt
    usage.completion += sum(answer.tokens for answer in answers)
    return answers


async def collect_all(prompts: Sequence[Pieces], usage: Usage) -> list[list[Answer]]:
    """Return ``collect`` for each prompt; all requests run at the same time. The first failure cancels the others."""
    tasks = [asyncio.ensure_future(collect(pieces, usage)) for pieces in prompts]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        await cancel(tasks)


async def merged(prompts: Sequence[Pieces]) -> AsyncGenerator[tuple[int, Piece], None]:
    """Yield the pieces of all prompts as they arrive, each with its prompt's number.

    The first failure ends all streams. Closing the generator closes all streams.
    """
    if len(prompts) == 1:  # without the cost of a task and a queue
        async with aclosing(prompts[0]) as only:
            async for piece in only:
                yield 0, piece
        return
    ready: asyncio.Queue[tuple[int, Piece | BaseException | None]] = asyncio.Queue(maxsize=1)

    async def pass_on(number: int, pieces: Pieces) -> None:
        try:
            async with aclosing(pieces):
                async for piece in pieces:
                    await ready.put((number, piece))
            await ready.put((number, None))
        except Exception as error:
            await ready.put((number, error))

    tasks = [asyncio.ensure_future(pass_on(number, pieces)) for number, pieces in enumerate(prompts)]
    running = len(tasks)
    try:
        while running:
            number, item = await ready.get()
            if isinstance(item, BaseException):
                raise item
            if item is None:
                running -= 1
            else:
                yield number, item
    finally:
        await cancel(tasks)


async def cancel(tasks: Sequence[asyncio.Future[Any]]) -> None:
    """Cancel running tasks, and wait until all have ended."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def head(kind: str, prefix: str, model: str) -> dict[str, Any]:
    """Return the fields that every response and chunk of one request has."""
    return {"id": f"{prefix}-{secrets.token_hex(12)}", "object": kind, "created": int(time.time()), "model": model}


def event(content: dict[str, Any]) -> str:
    """Return a server-sent event."""
    return f"data: {json.dumps(content, ensure_ascii=False, separators=(',', ':'))}\n\n"
