"""A server of OpenAI's API on a real port, in front of a fake Triton or, for ``base_url``, one that runs elsewhere."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
from fake_triton import FakeTriton

from deploykit.errors import RequestError
from deploykit.openai.app import create_app
from deploykit.openai.server import OpenAIServer
from deploykit.openai.triton_generator import TritonGenerator
from deploykit.tasks.classification.facts import Classification
from deploykit.tasks.protocol import TaskFacts
from deploykit.tasks.text_generation.facts import TextGeneration
from deploykit.triton.preflight import listen

MODELS: dict[str, TaskFacts] = {
    "writer": TextGeneration("llama", 100, 2048, 0, (1,)),
    "tweets": Classification(("bad", "good"), max_length=64, pad_token_id=0),
}


@dataclass(frozen=True)
class Row:
    label: str
    scores: tuple[float, float]
    error: str = ""


class Tweets:
    """A classifier: a text is good if it says so. A text that says "refuse" is refused."""

    def __init__(self) -> None:
        self.task = MODELS["tweets"]

    def scores(self, texts: Sequence[str]) -> Any:
        import numpy as np

        if "full" in texts:
            raise RequestError("the queue is full", 503)
        if any("refuse" in text for text in texts):
            raise RequestError("a text is refused", 400)
        return np.array([[0.25, 0.75] if "good" in text else [0.75, 0.25] for text in texts], np.float32)

    def close(self) -> None:
        """Do nothing."""


@dataclass(frozen=True)
class Service:
    """``url`` ends with /v1; ``triton`` is what the server asks."""

    url: str
    triton: FakeTriton


def serve(triton: FakeTriton, **options: Any) -> OpenAIServer:
    """Return a server on a free port that asks ``triton``."""
    drain = options.pop("drain", 5.0)
    generator = TritonGenerator(triton.address)
    app = create_app(MODELS, generator, lambda name: Tweets(), created=1_790_000_000, **options)
    return OpenAIServer(app, listen("openai", "127.0.0.1", 0), drain=drain)


@pytest.fixture(scope="session")
def service() -> Iterator[Service]:
    with FakeTriton() as triton, serve(triton) as server:
        yield Service(server.url, triton)


@pytest.fixture(scope="session")
def base_url(request: pytest.FixtureRequest) -> str:
    """The server that clients are tested with: DEPLOYKIT_TEST_OPENAI_URL, or the fake one."""
    return os.environ.get("DEPLOYKIT_TEST_OPENAI_URL") or request.getfixturevalue("service").url


@pytest.fixture(scope="session")
def model() -> str:
    """The language model there."""
    return os.environ.get("DEPLOYKIT_TEST_OPENAI_MODEL", "writer")
