"""Define the options of a fine-tuning run for translation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from deploykit.data.noise import check_noises
from deploykit.data.reading import flag
from deploykit.errors import UsageError
from deploykit.tasks.translation.facts import Translation
from deploykit.tasks.translation.presets import PRESETS
from deploykit.training.options import FinetuneOptions, described


@dataclass(frozen=True)
class TranslationOptions(FinetuneOptions):
    """Options of a run for translation."""

    task: str = Translation.name
    source_lang: str = described("", "Source language, as the checkpoint names it: en, eng_Latn.")
    target_lang: str = described("", "Target language.")
    source_column: str | None = described(None, "Source column (default: detected).")
    target_column: str | None = described(None, "Target column (default: detected).")
    from_config: str | None = described(None, "Train a new model of this size, instead of TARGET.", PRESETS)
    vocabulary: int = described(
        0, "Vocabulary size with --from-config; smaller if there is little text (default: the preset's)."
    )
    batch_tokens: int = described(
        2048,
        "Maximum tokens of a batch, padding included; pairs are counted on their longer side, unless one row has more.",
    )
    label_smoothing_factor: float = 0.1
    num_beams: int | None = described(None, "Number of beams for the final translations (default: the checkpoint's).")
    teacher: str | None = None
    distill_targets: str = described(
        "replace",
        "Replace the targets of the training rows by the teacher's translations, or add the translations as separate rows.",
        ("replace", "join"),
    )
    augment: tuple[str, ...] = ()
    r_drop: float = 0.0
    student_layers: int = described(0, hidden=True)
    student_decoder_layers: int = described(0, hidden=True)
    eval_rows: int = described(
        256,
        "Maximum validation rows that an evaluation translates; for text-generation, held-out rows to answer before and "
        "after training.",
    )
    held_out_rows: int = described(1000, "Maximum rows to split off for validation, and for the test.")

    shares_batches: ClassVar[bool] = True

    ranges: ClassVar[Mapping[str, tuple[float, float]]] = {
        **FinetuneOptions.ranges,
        "vocabulary": (0, 1_000_000),
        "batch_tokens": (16, 10_000_000),
        "num_beams": (1, 64),
        "r_drop": (0, 100),
        "student_layers": (0, 1000),
        "student_decoder_layers": (0, 1000),
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
        self.refuse_without("teacher", "distill_targets")
        check_noises(self.augment, "a translator's sources")
        if (self.student_layers or self.student_decoder_layers) and (self.lora_r or self.from_config is not None):
            other = "--lora-r adapts a checkpoint as it is" if self.lora_r else "--from-config has none to keep"
            raise UsageError(f"--student keeps some layers of a checkpoint, and {other}", "leave one out")
