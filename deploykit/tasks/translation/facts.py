"""Define the facts of a translator, which go with it from fine-tuning to the server."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from deploykit.runtime.generation import Generation
from deploykit.tasks.protocol import GraphKind
from deploykit.text import MAX_TEXT_CHARS


@dataclass(frozen=True)
class Translation:
    """Facts of a model that translates text of one language into another.

    ``source`` and ``target`` are the checkpoint's language codes (or plain names for a checkpoint of one pair).
    ``max_source_length`` counts tokens, including special ones. ``eos_token_ids`` end a translation. ``languages`` are
    the codes of a multilingual checkpoint, empty for one language pair.
    """

    name: ClassVar[str] = "translation"
    graph_kind: ClassVar[GraphKind] = "encoder-decoder"
    max_chars: ClassVar[int] = MAX_TEXT_CHARS

    source: str
    target: str
    family: str
    vocabulary: int
    max_source_length: int
    max_target_length: int
    pad_token_id: int
    eos_token_ids: tuple[int, ...]
    decoder_start_token_id: int
    generation: Generation = field(default_factory=Generation)
    source_column: str = "source"
    target_column: str = "target"
    languages: tuple[str, ...] = ()

    @property
    def shape_limits(self) -> Mapping[str, int]:
        return {"length": self.max_source_length, "past": self.max_target_length}

    @property
    def model_config(self) -> Mapping[str, Any]:
        return {}
