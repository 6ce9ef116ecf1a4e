"""What a model is for: the facts that travel with it from fine-tuning to the server.

A task is one axis of change (the engine is the other): a new task is a dataclass here and one line
in ``TASKS``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from deploykit.errors import ArtifactError

LABEL_SEPARATOR = "|"
"""Between the labels of one row of a multi-label model, in data files and in answers."""


@dataclass(frozen=True)
class Classification:
    """One label a text, or with ``multi_label`` any number of them.

    ``labels`` is the order of the model's outputs. ``max_length`` counts tokens, special ones
    included; longer texts are truncated. ``text_columns`` are joined by ``text_separator``.
    """

    name: ClassVar[str] = "classification"

    labels: tuple[str, ...]
    max_length: int
    pad_token_id: int
    multi_label: bool = False
    text_columns: tuple[str, ...] = ("text",)
    text_separator: str = " "
    label_column: str = "label"
    threshold: float = 0.5

    def scores(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """Probabilities, float32 [rows, labels], of logits of that shape."""
        exact = logits.astype(np.float64)
        if self.multi_label:
            probabilities = 1.0 / (1.0 + np.exp(-exact))
        else:
            weights = np.exp(exact - exact.max(axis=-1, keepdims=True))
            probabilities = weights / weights.sum(axis=-1, keepdims=True)
        return np.asarray(probabilities, np.float32)

    def decide(self, scores: NDArray[np.float32]) -> list[str]:
        """The answer for each row of ``scores``; several labels are joined by ``|``."""
        if self.multi_label:
            return [
                LABEL_SEPARATOR.join(label for label, s in zip(self.labels, row) if s >= self.threshold)
                for row in scores
            ]
        return [self.labels[i] for i in scores.argmax(axis=-1)]

    def targets(self, labels: Sequence[str]) -> NDArray[np.bool_]:
        """Truth as bool [rows, labels]. Raises KeyError for a label the model does not have."""
        index = {label: i for i, label in enumerate(self.labels)}
        truth = np.zeros((len(labels), len(self.labels)), bool)
        for row, cell in enumerate(labels):
            for label in cell.split(LABEL_SEPARATOR) if self.multi_label else (cell,):
                if label or not self.multi_label:
                    truth[row, index[label]] = True
        return truth


@dataclass(frozen=True)
class Generation:
    """How a translation is searched for: the fields of a Hugging Face generation config that we decode by.

    ``max_length`` and ``min_length`` count target tokens as Hugging Face does: with the start token.
    ``bad_words`` are token sequences that may not be completed; ``suppressed`` single tokens that may
    never come. ``renormalize``: probabilities add up to 1 over what is left (opus-mt has it).
    ``early_stopping`` is True, False or "never" (Hugging Face documentation, "GenerationConfig").
    """

    beam_size: int = 1
    max_length: int = 512
    min_length: int = 0
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    no_repeat_ngram_size: int = 0
    repetition_penalty: float = 1.0
    bad_words: tuple[tuple[int, ...], ...] = ()
    suppressed: tuple[int, ...] = ()
    forced_bos_token_id: int | None = None
    forced_eos_token_id: int | None = None
    renormalize: bool = False


@dataclass(frozen=True)
class Translation:
    """Text of one language in, text of another out.

    ``source`` and ``target`` are the language codes that the checkpoint knows (or plain names for a
    checkpoint of one pair). ``max_source_length`` counts tokens, special ones included.
    ``eos_token_ids`` end a translation; ``languages`` are the codes that a many-language checkpoint
    can be asked for, empty for a checkpoint of one pair.
    """

    name: ClassVar[str] = "translation"

    source: str
    target: str
    family: str
    vocabulary: int
    max_source_length: int
    max_target_length: int
    pad_token_id: int
    eos_token_ids: tuple[int, ...]
    decoder_start_token_id: int
    generation: Generation = Generation()
    source_column: str = "source"
    target_column: str = "target"
    languages: tuple[str, ...] = ()


Task = Classification | Translation

TASKS: Mapping[str, type[Classification] | type[Translation]] = {
    Classification.name: Classification,
    Translation.name: Translation,
}


def task_to_json(task: Task) -> dict[str, Any]:
    return {"name": task.name, **dataclasses.asdict(task)}


def task_from_json(record: Mapping[str, Any]) -> Task:
    """Rebuild a task from a manifest. Raises ArtifactError for a task this version does not know."""
    fields: dict[str, Any] = {k: _tuples(v) for k, v in record.items() if k != "name"}
    try:
        if "generation" in fields:
            fields["generation"] = Generation(**{k: _tuples(v) for k, v in fields["generation"].items()})
        return TASKS[record["name"]](**fields)
    except (KeyError, TypeError) as error:
        raise ArtifactError(
            f"the manifest describes a task this version of deploykit cannot read: {error}",
            "upgrade deploykit, or make the artifact again",
        ) from error


def _tuples(value: Any) -> Any:
    """JSON's lists as the tuples that the dataclasses hold."""
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value
