"""A language model that needs no weights: its answers follow from the prompt by rules, and it can fail on demand."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from deploykit.openai.errors import ApiError, restarting
from deploykit.openai.generator import GenerationRequest, Piece

ENDLESS, SLOW, HANGS, FULL = "endless", "slow", "hangs", "full"
"""Prompts that make the model go on forever, take a second, give no first token, and have a full queue."""
LOST, BREAKS, TOO_LONG = "lost", "breaks", "too long"
"""Prompts that make it be restarting, die after the first token, and refuse the prompt."""


class FakeGenerator:
    """Satisfies ``Generator``. ``running`` counts the open requests, ``asked`` are those so far."""

    def __init__(self) -> None:
        self.running = 0
        self.asked: list[GenerationRequest] = []
        self.lost_for = 0
        """How many of the next requests find the model restarting."""

    async def generate(self, asked: GenerationRequest) -> AsyncGenerator[Piece, None]:
        self.asked.append(asked)
        self.running += 1
        try:
            async for piece in self._pieces(asked):
                yield piece
        finally:
            self.running -= 1

    async def ready(self) -> bool:
        return self.lost_for == 0

    async def close(self) -> None:
        """Do nothing."""

    async def _pieces(self, asked: GenerationRequest) -> AsyncGenerator[Piece, None]:
        prompt = prompt_of(asked)
        if self.lost_for or prompt == LOST:
            self.lost_for = max(0, self.lost_for - 1)
            raise restarting("the server is being restarted")
        if prompt == FULL:
            raise ApiError("the queue is full", 429)
        if prompt == TOO_LONG:
            raise ApiError("text_input has 9000 tokens, the context is 2048", param="prompt")
        if prompt == HANGS:
            await asyncio.Event().wait()
        answers = [tokens_of(asked, index) for index in range(asked.sampling.get("n", 1))]
        if asked.stream:
            steps = 10**9 if prompt == ENDLESS else max(len(tokens) for tokens, _ in answers)
            for step in range(steps):
                if prompt == ENDLESS:
                    answers[0][0].append(" more")
                yield self._piece(asked, prompt, answers, step)
                if prompt == BREAKS:
                    raise restarting("the connection was lost")
                await asyncio.sleep(0.15 if prompt == SLOW else 0)
        elif prompt == ENDLESS:
            await asyncio.Event().wait()
        else:
            tokens = [self._piece(asked, prompt, answers, step) for step in range(max(len(t) for t, _ in answers))]
            yield Piece(
                ["".join(piece.texts[i] for piece in tokens) for i in range(len(answers))],
                [finish for _, finish in answers],
                tokens[0].prompt_tokens,
                [len(t) for t, _ in answers],
                [[row for piece in tokens for row in piece.logprobs[i]] for i in range(len(answers))]
                if asked.logprobs
                else (),
            )

    def _piece(
        self, asked: GenerationRequest, prompt: str, answers: Sequence[tuple[list[str], str]], step: int
    ) -> Piece:
        new = [tokens[step : step + 1] for tokens, _ in answers]
        last = [step == len(tokens) - 1 and prompt != ENDLESS for tokens, _ in answers]
        rows: list[list[dict[str, Any]]] = [[self._row(token, asked) for token in tokens] for tokens in new]
        if asked.logprobs and asked.sampling.get("echo") and step == 0:
            first = [self._row(word, asked) for word in split(prompt)]
            first[0] = {**first[0], "logprob": None, "top": []}
            rows = [[*first, *row] for row in rows]
        before = prompt if asked.sampling.get("echo") and step == 0 else ""
        return Piece(
            [before + "".join(tokens) for tokens in new],
            [finish if end else "" for end, (_, finish) in zip(last, answers)],
            len(split(prompt)),
            [len(tokens) for tokens in new],
            rows if asked.logprobs else (),
        )

    def _row(self, token: str, asked: GenerationRequest) -> dict[str, Any]:
        top = [
            {"token": f"t{i}", "token_id": i, "bytes": list(b"t%d" % i), "logprob": -1.0 - i}
            for i in range(asked.sampling.get("logprobs", 0))
        ]
        return {"token": token, "token_id": len(token), "bytes": list(token.encode()), "logprob": -0.5, "top": top}


def prompt_of(asked: GenerationRequest) -> str:
    """Return the text prompt, a word for each token id, or the last message's content."""
    if asked.text is not None:
        return asked.text
    if asked.ids is not None:
        return " ".join(f"w{token}" for token in asked.ids)
    assert asked.messages is not None
    found = json.loads(asked.messages)
    content: str = (found["messages"] if isinstance(found, dict) else found)[-1]["content"]
    return content


def split(text: str) -> list[str]:
    """Split a text into tokens: a word with the space before it."""
    words = text.split(" ")
    return [words[0], *(f" {word}" for word in words[1:])]


def tokens_of(asked: GenerationRequest, index: int) -> tuple[list[str], str]:
    """Return the tokens of answer ``index`` and how it ends."""
    sampling = asked.sampling
    prompt = prompt_of(asked)
    if "json_schema" in sampling:
        text = json.dumps(example(sampling["json_schema"]))
    elif "choice" in sampling:
        text = sampling["choice"][0]
    elif prompt == "weather?" and asked.messages is not None and "tools" in asked.messages:
        [tool] = json.loads(asked.messages)["tools"]
        call = {"name": tool["function"]["name"], "arguments": example(tool["function"]["parameters"])}
        text = f"I look it up.\n<tool_call>\n{json.dumps(call)}\n</tool_call>"
    elif sampling.get("temperature"):
        text = f"seed {sampling.get('seed', 0)} answer {index} été 😀"
    else:
        text = "Paris is the capital of France 😀"
    finish = "stop"
    for stop in sampling.get("stop", ()):
        text = text.partition(stop)[0]
    tokens = split(text)
    most = sampling.get("max_new_tokens", 100)
    if len(tokens) > most:
        tokens, finish = tokens[:most], "length"
    return tokens or [""], finish


def example(schema: Any) -> Any:
    """Return a value that fits the JSON schema, as far as these tests' schemas go."""
    if not isinstance(schema, dict):
        return {"answer": 42}
    if "anyOf" in schema:
        return example(schema["anyOf"][0])
    if "const" in schema:
        return schema["const"]
    if "enum" in schema:
        return schema["enum"][0]
    kind = schema.get("type", "object")
    if kind == "object":
        return {name: example(inner) for name, inner in schema.get("properties", {}).items()}
    return {"string": "Oslo", "integer": 7, "number": 1.5, "boolean": True, "array": [], "null": None}[kind]
