"""Measure a served language model as its users see it: streamed to the ``openai`` client."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np

from deploykit.errors import MissingDependencyError, ServerError


@dataclass(frozen=True)
class StreamedAnswer:
    """One answer. Times are in seconds since the request was sent: of each piece, and of the end."""

    text: str
    tokens: int
    pieces: tuple[float, ...]
    seconds: float


@dataclass(frozen=True)
class StreamLoad:
    """Figures of requests sent ``concurrency`` at a time. ``tokens_per_s`` is of all together; times are in
    milliseconds: to the first piece of an answer, and between two pieces."""

    concurrency: int
    requests: int
    tokens: int
    tokens_per_s: float
    first_token_p50_ms: float
    first_token_p99_ms: float
    between_tokens_p50_ms: float
    between_tokens_p99_ms: float


def ask(
    url: str, model: str, prompts: Sequence[str], *, concurrency: int = 1, api_key: str = "none", **options: Any
) -> tuple[list[StreamedAnswer], StreamLoad]:
    """Send each prompt as a user's message, and return the answers in order, with figures over all requests.

    ``url`` is that of ``deploykit serve --openai-port``; ``options`` are those of chat.completions.create. Raises
    ServerError when a request fails.
    """
    started = time.perf_counter()
    answers = asyncio.run(_ask_all(url, model, prompts, concurrency, api_key, options))
    seconds = time.perf_counter() - started
    firsts = [1e3 * answer.pieces[0] for answer in answers if answer.pieces]
    gaps = [1e3 * gap for answer in answers for gap in np.diff(answer.pieces)]
    tokens = sum(answer.tokens for answer in answers)
    figures = StreamLoad(
        concurrency, len(answers), tokens, tokens / seconds, _p50(firsts), _p99(firsts), _p50(gaps), _p99(gaps)
    )
    return answers, figures


async def _ask_all(
    url: str, model: str, prompts: Sequence[str], concurrency: int, api_key: str, options: dict[str, Any]
) -> list[StreamedAnswer]:
    try:
        import openai
    except ImportError as error:
        raise MissingDependencyError("the openai client is not installed", "pip install openai") from error
    turns = asyncio.Semaphore(concurrency)
    async with openai.AsyncOpenAI(base_url=url, api_key=api_key, max_retries=0, timeout=600) as client:

        async def one(prompt: str) -> StreamedAnswer:
            async with turns:
                started = time.perf_counter()
                pieces, text, tokens = [], "", 0
                stream = await client.chat.completions.create(
                    model=model, messages=[{"role": "user", "content": prompt}], stream=True,
                    stream_options={"include_usage": True}, **options,
                )  # fmt: skip
                async for chunk in stream:
                    if chunk.usage is not None:
                        tokens = chunk.usage.completion_tokens
                    elif chunk.choices and chunk.choices[0].delta.content:
                        pieces.append(time.perf_counter() - started)
                        text += chunk.choices[0].delta.content
                return StreamedAnswer(text, tokens, tuple(pieces), time.perf_counter() - started)

        try:
            return list(await asyncio.gather(*map(one, prompts)))
        except openai.APIError as error:
            raise ServerError(f"{url}: {error.message}", "see the server's log") from error


def _p50(values: Sequence[float]) -> float:
    return float(median(values)) if values else 0.0


def _p99(values: Sequence[float]) -> float:
    return float(np.percentile(values, 99)) if values else 0.0
