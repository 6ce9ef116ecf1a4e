"""Define the options of a fine-tuning run for token classification."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from deploykit.errors import UsageError
from deploykit.training.options import FinetuneOptions
from token_classification.facts import TokenClassification


@dataclass(frozen=True)
class TokenClassificationOptions(FinetuneOptions):
    """The fields that deploykit's own tasks do not have become options of ``deploykit finetune``."""

    task: str = TokenClassification.name
    words_column: str | None = field(default=None, metadata={"help": "Of words or tokens (default: detected)."})
    label_column: str | None = None
    per_device_train_batch_size: int = 16

    ranges: ClassVar[Mapping[str, tuple[float, float]]] = {
        **FinetuneOptions.ranges,
        "per_device_train_batch_size": (1, 100_000),
    }

    def check(self) -> None:
        super().check()
        if self.model is None:
            raise UsageError("there is no checkpoint to fine-tune", "name its folder, or a hub id")
