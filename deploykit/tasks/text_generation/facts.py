"""Hold the facts of a language model that travel with it from fine-tuning to the server."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from deploykit.runtime.sampling import Sampling
from deploykit.tasks.protocol import GraphKind
from deploykit.text import MAX_TEXT_CHARS


@dataclass(frozen=True)
class TextGeneration:
    """A prompt in, an answer out.

    ``family`` is the Hugging Face model type; ``max_length`` the context in tokens, prompt and answer together.
    ``eos_token_ids`` end an answer. ``special_tokens`` are those that a chat template may name: ``bos_token``, say.
    ``columns`` are those of the training rows, for files of rows that come later. ``chat``: it has a chat template.
    """

    name: ClassVar[str] = "text-generation"
    graph_kind: ClassVar[GraphKind] = "decoder"
    max_chars: ClassVar[int] = MAX_TEXT_CHARS

    family: str
    vocabulary: int
    max_length: int
    pad_token_id: int
    eos_token_ids: tuple[int, ...]
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    sampling: Sampling = field(default_factory=Sampling)
    columns: tuple[str, ...] = ()
    chat: bool = False

    @property
    def shape_limits(self) -> Mapping[str, int]:
        return {"length": self.max_length, "past": self.max_length}

    @property
    def model_config(self) -> Mapping[str, Any]:
        return {}
