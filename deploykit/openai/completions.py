"""Answer /v1/completions."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from deploykit.openai.collect_answers import DONE, Pieces, Usage, collect_all, event, head, merged
from deploykit.openai.completion_request import CompletionBody
from deploykit.openai.generator import Piece
from deploykit.openai.logprobs import CompletionLogprobs


async def completion(body: CompletionBody, prompts: Sequence[Pieces]) -> dict[str, Any]:
    """Return the whole response, with the choices of each prompt together, in the order of the prompts."""
    usage = Usage()
    choices: list[dict[str, Any]] = []
    for answers in await collect_all(prompts, usage):
        for answer in answers:
            choice = _Choice(body, len(choices))
            choices.append(choice.new(answer.text, answer.finish or "stop", answer.logprobs))
    return {**head("text_completion", "cmpl", body.model), "choices": choices, "usage": usage.to_json()}


async def completion_events(body: CompletionBody, prompts: Sequence[Pieces]) -> AsyncGenerator[str, None]:
    """Yield the response as server-sent events, those of one piece together."""
    top = head("text_completion", "cmpl", body.model)
    usage = Usage()
    prompt_tokens = [0] * len(prompts)
    choices = [_Choice(body, index) for index in range(body.n * len(prompts))]
    pieces = merged(prompts)
    async with aclosing(pieces):
        async for number, piece in pieces:
            prompt_tokens[number] = piece.prompt_tokens or prompt_tokens[number]
            usage.prompt = sum(prompt_tokens)
            usage.completion += sum(piece.tokens)
            chunks = _chunks(choices[number * body.n :], piece)
            if chunks:
                known = body.chunk_usage(usage)
                yield "".join(event({**top, "choices": [chunk], **known}) for chunk in chunks)
    if body.include_usage:
        yield event({**top, "choices": [], "usage": usage.to_json()})
    yield DONE


def _chunks(choices: Sequence[_Choice], piece: Piece) -> list[dict[str, Any]]:
    """Return the chunks for the new parts of the answers to one prompt."""
    found = []
    for index, (text, finish) in enumerate(zip(piece.texts, piece.finishes)):
        tokens = piece.logprobs[index] if piece.logprobs else ()
        if not choices[index].ended and (text or finish or tokens):
            found.append(choices[index].new(text, finish, tokens))
    return found


class _Choice:
    """One answer to a prompt, as its parts are sent."""

    def __init__(self, body: CompletionBody, index: int) -> None:
        self.ended = False
        self._index = index
        self._logprobs = None if body.logprobs is None else CompletionLogprobs()

    def new(self, text: str, finish: str, tokens: Sequence[Any]) -> dict[str, Any]:
        """Return the next part; ``finish`` is "" while the answer continues."""
        logprobs = self._logprobs and self._logprobs.add(tokens)
        self.ended = bool(finish)
        return {"index": self._index, "text": text, "logprobs": logprobs, "finish_reason": finish or None}
