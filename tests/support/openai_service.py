"""A server of OpenAI's API on a real port, in front of a fake Triton."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from fake_triton import FakeTriton

from deploykit.errors import RequestError
from deploykit.openai.app import create_app
from deploykit.openai.certificate import Certificate
from deploykit.openai.server import OpenAIServer
from deploykit.openai.triton_generator import TritonGenerator
from deploykit.tasks.classification.facts import Classification
from deploykit.tasks.protocol import TaskFacts
from deploykit.tasks.text_generation.facts import TextGeneration
from deploykit.tasks.translation.facts import Translation
from deploykit.tasks.translation.translated import Translated
from deploykit.triton.preflight import listen

MODELS: dict[str, TaskFacts] = {
    "writer": TextGeneration("llama", 100, 2048, 0, (1,)),
    "tweets": Classification(("bad", "good"), max_length=64, pad_token_id=0),
    "en-fr": Translation("en", "fr", "marian", 100, 64, 64, 0, (1,), 0),
}


class Tweets:
    """A classifier: a text is good if it says so. It refuses a text that says "refuse"; "full" finds its queue full."""

    task = MODELS["tweets"]

    def scores(self, texts: Sequence[str]) -> Any:
        if "full" in texts:
            raise RequestError("the queue is full", 503)
        if any("refuse" in text for text in texts):
            raise RequestError("this text is refused", 400)
        return np.array([[0.25, 0.75] if "good" in text else [0.75, 0.25] for text in texts], np.float32)

    def close(self) -> None:
        """Do nothing."""


class EnFr:
    """A translator that writes texts in capitals."""

    task = MODELS["en-fr"]

    def translate(self, texts: Sequence[str], generation: Any = None, **options: Any) -> list[Translated]:
        return [Translated(text.upper(), 0.0, 1, 2, "eos") for text in texts]

    def close(self) -> None:
        """Do nothing."""


@dataclass(frozen=True)
class Service:
    """``url`` ends with /v1; ``triton`` is what the server asks."""

    url: str
    triton: FakeTriton


def serve(
    triton: FakeTriton, *, drain: float = 5.0, certificate: Certificate | None = None, **options: Any
) -> OpenAIServer:
    """Return a server on a free port that asks ``triton``."""
    app = create_app(
        MODELS, TritonGenerator(triton.address), lambda name: EnFr() if name == "en-fr" else Tweets(), created=1_790_000_000, **options
    )  # fmt: skip
    return OpenAIServer(app, listen("openai", "127.0.0.1", 0), drain=drain, certificate=certificate)
