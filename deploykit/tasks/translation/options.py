"""Define the options of a fine-tuning run for translation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from deploykit.errors import UsageError
from deploykit.tasks.translation.facts import Translation
from deploykit.tasks.translation.presets import PRESETS
from deploykit.training.options import FinetuneOptions, flag

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class TranslationOptions(FinetuneOptions):
    """``batch_tokens`` bounds a batch's padded tokens, on its longer side, unless one row has more; ``num_beams`` None is
    the checkpoint's own."""

    task: str = Translation.name
    source_lang: str = ""
    target_lang: str = ""
    source_column: str | None = None
    target_column: str | None = None
    from_config: str | None = None
    vocabulary: int = 0
    batch_tokens: int = 2048
    label_smoothing_factor: float = 0.1
    num_beams: int | None = None
    eval_rows: int = 256
    held_out_rows: int = 1000

    ranges: ClassVar[Mapping[str, tuple[float, float]]] = {
        **FinetuneOptions.ranges,
        "vocabulary": (0, 1_000_000),
        "batch_tokens": (16, 10_000_000),
        "num_beams": (1, 64),
        "eval_rows": (1, 1_000_000),
        "held_out_rows": (1, 1_000_000_000),
    }

    @property
    def origin(self) -> str:
        return self.model or self.from_config or ""

    @classmethod
    def preset(cls, name: str | None) -> Mapping[str, Any]:
        preset = PRESETS.get(name or "")
        return preset.training if preset else {}

    def check(self) -> None:
        super().check()
        if (self.model is None) == (self.from_config is None):
            raise UsageError(
                "a checkpoint and --from-config are both given"
                if self.model
                else "neither a checkpoint nor --from-config is given",
                f"give one: a checkpoint to fine-tune, or {', '.join(PRESETS)} to train from nothing",
            )
        if self.from_config is not None and self.from_config not in PRESETS:
            raise UsageError(f"--from-config {self.from_config}: there is none", f"give one of {', '.join(PRESETS)}")
        for name in ("source_lang", "target_lang"):
            if not getattr(self, name):
                raise UsageError(f"{flag(name)} is missing", "give the language's code, such as en")
        if self.source_lang == self.target_lang:
            raise UsageError(
                f"--source-lang and --target-lang are both {self.source_lang}", "translate into another language"
            )
        if self.model is not None and self.vocabulary:
            raise UsageError("--vocabulary is for --from-config", "leave it out: a checkpoint has its own")
        if self.from_config is not None and self.lora_r:
            raise UsageError("--lora-r is for a checkpoint", "leave it out: with --from-config all weights are new")
