"""Define the options of a fine-tuning run for question answering."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from deploykit.data.noise import check_noises
from deploykit.errors import UsageError
from deploykit.tasks.question_answering.facts import QuestionAnswering
from deploykit.training.options import FinetuneOptions, described

WHOLE_WORDS = ("auto", "yes", "no")


@dataclass(frozen=True)
class QuestionAnsweringOptions(FinetuneOptions):
    """Options of a run for question answering."""

    task: str = QuestionAnswering.name
    max_length: int = 384
    num_train_epochs: float = 2.0
    learning_rate: float = 3e-5
    per_device_train_batch_size: int = described(16, "Rows of a batch.")
    doc_stride: int = described(128, "Number of tokens that neighboring windows of a context share.")
    max_answer_length: int = described(30, "Maximum tokens of an answer.")
    whole_words: str = described(
        "auto", "Extend answers to whole words. auto: if that is better on the validation rows.", WHOLE_WORDS
    )

    r_drop: float = 0.0
    teacher: str | None = None
    distill_alpha: float = 0.5
    distill_temperature: float = 2.0
    distill_hidden: float = 0.0
    augment: tuple[str, ...] = ()
    student_layers: int = described(0, hidden=True)

    shares_batches: ClassVar[bool] = True

    ranges: ClassVar[Mapping[str, tuple[float, float]]] = {
        **FinetuneOptions.ranges,
        "per_device_train_batch_size": (1, 100_000),
        "doc_stride": (0, 100_000),
        "max_answer_length": (1, 100_000),
        "r_drop": (0, 100),
        "distill_alpha": (0, 1),
        "distill_temperature": (0.01, 100),
        "distill_hidden": (0, 1000),
        "student_layers": (0, 1000),
    }

    def check(self) -> None:
        super().check()
        if self.model is None:
            raise UsageError("--model is missing", "give the folder of a checkpoint, or a hub id")
        if self.doc_stride >= self.max_length:
            raise UsageError(
                f"--doc-stride is {self.doc_stride}, and a window has {self.max_length} tokens",
                f"give a --doc-stride well below {self.max_length}",
            )
        if self.whole_words not in WHOLE_WORDS:
            raise UsageError(f"--whole-words is {self.whole_words!r}", f"choose one of: {', '.join(WHOLE_WORDS)}")
        self.refuse_without("teacher", "distill_alpha", "distill_temperature", "distill_hidden")
        if self.student_layers and self.lora_r:
            raise UsageError("--student changes the layers that an adapter of --lora-r would adapt", "leave one out")
        check_noises(self.augment, "questions")
