"""Translate with a model on a running server, through the same interface as in this process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, cast

from deploykit.errors import UsageError
from deploykit.runtime.generation import Generation
from deploykit.runtime.served import DEFAULT_URL, ServedModel, require_all
from deploykit.runtime.serving_settings import LongInput, Split
from deploykit.tasks.registry import task_of
from deploykit.tasks.translation.facts import Translation
from deploykit.tasks.translation.translated import EMPTY, Finish, Translated

_MAX_TRANSLATION_BYTES = 32 << 10  # so that a request is answered within a minute


_OF_CHECKPOINT = ("bad_words", "suppressed", "forced_bos_token_id", "forced_eos_token_id")


@dataclass(frozen=True)
class TranslatedRow:
    """The translation of one text. If ``error`` is not empty, it says why ``translated`` is ``EMPTY``."""

    translated: Translated
    error: str


class ServedTranslator(ServedModel):
    """The translator ``name`` on the Triton server at ``url``; satisfies ``TextTranslator``.

    Takes the options of ``ServedModel``; the default timeout (seconds) is longer.
    """

    def __init__(self, name: str, url: str = DEFAULT_URL, *, timeout: float = 600.0, **options: Any) -> None:
        super().__init__(name, url, timeout=timeout, **options)
        if not isinstance(self.facts, Translation):
            self.close()
            raise UsageError(f"{name} {task_of(self.facts).does}, it does not translate", "use deploykit predict")
        self.task: Translation = self.facts

    def translate(
        self,
        texts: Sequence[str],
        generation: Generation | None = None,
        *,
        long_input: LongInput = "split",
        split: Split = "sentence",
        scored: bool = True,
    ) -> list[Translated]:
        """Translate each text, in their order. Raises RequestError if any text is refused.

        Without ``scored`` scores are 0, and greedy search is faster.
        """
        rows = self.translate_rows(texts, generation, long_input=long_input, split=split, scored=scored)
        require_all([row.error for row in rows])
        return [row.translated for row in rows]

    def translate_rows(
        self,
        texts: Sequence[str],
        generation: Generation | None = None,
        *,
        long_input: LongInput = "split",
        split: Split = "sentence",
        scored: bool = True,
    ) -> list[TranslatedRow]:
        """Translate as ``translate`` does, but a text that the model refuses fails alone."""
        parameters = {
            "long_input": long_input,
            "split": split,
            **request_parameters(self.task, generation or self.task.generation),
        }
        names = ["TRANSLATION", "SOURCE_TOKENS", "TARGET_TOKENS", "FINISH", "ERROR", *(["SCORE"] if scored else [])]

        def infer(chunk: list[bytes]) -> list[TranslatedRow]:
            columns = [column.reshape(-1).tolist() for column in self._infer({"TEXT": chunk}, names, parameters)]
            scores = columns[5] if scored else [0.0] * len(chunk)
            return [
                TranslatedRow(
                    Translated(text.decode(), score, source, target, cast(Finish, finish.decode()))
                    if not error
                    else EMPTY,
                    error.decode(),
                )
                for text, source, target, finish, error, score in zip(*columns[:5], scores)
            ]

        return self._rows(texts, infer, lambda error: TranslatedRow(EMPTY, error), most_bytes=_MAX_TRANSLATION_BYTES)


def request_parameters(task: Translation, generation: Generation) -> dict[str, Any]:
    """Return the request parameters that make a served model of ``task`` search with ``generation``.

    Floating-point numbers are sent as strings: Triton has no such parameters. Raises UsageError for a field that a
    request cannot change.
    """
    parameters: dict[str, Any] = {}
    for field in fields(Generation):
        value = getattr(generation, field.name)
        if value == getattr(task.generation, field.name):
            continue
        if field.name in _OF_CHECKPOINT:
            raise UsageError(f"{field.name} of a served model cannot be changed", "leave it as it is")
        if field.name in ("max_length", "min_length"):  # ours count the start token
            parameters[f"{field.name[:3]}_new_tokens"] = max(value - 1, 0)
        else:
            parameters[field.name] = repr(value) if isinstance(value, float) else value
    return parameters
