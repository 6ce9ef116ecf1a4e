"""Bundle an answerer for a Jetson, and judge the answers of the engine that the device builds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from deploykit.errors import DataError
from deploykit.runtime.engines import load_engine
from deploykit.tasks.bundle import BundledEncoder, Verdict, share
from deploykit.tasks.protocol import Predictor
from deploykit.tasks.question_answering.facts import QuestionAnswering, from_text
from deploykit.tasks.question_answering.predictor import Answerer, load_answerer

SAME_ANSWERS: Mapping[str, float] = {"fp32": 0.98, "fp16": 0.95, "int8": 0.9}
"""Least share of questions that must get the same answer as from ONNX Runtime with the same graph."""


class BundledAnswerer(BundledEncoder[QuestionAnswering]):
    """An answerer's part of a bundle; an answer is a span's text, start and end, or the error."""

    def read(self, source: str, *, kept: bool) -> Iterable[str | None]:
        from deploykit.data.reading import AS_FOUND
        from deploykit.tasks.question_answering.evaluate import texts_and_answers

        return (text for text, _ in texts_and_answers(source, AS_FOUND))

    def load(self, folder: Path, files: Sequence[str], engine: str, parameters: Mapping[str, str]) -> Predictor:
        loaded = load_engine(engine, folder / files[0])
        return load_answerer(folder, self._task, loaded, token_budget=int(parameters.get("token_budget", 0)))

    def answers(self, model: Predictor, texts: Sequence[str]) -> list[Any]:
        assert isinstance(model, Answerer)
        answers: list[Any] = []
        for found in model.try_all([from_text(text) for text in texts]):
            if isinstance(found, DataError):
                answers.append(["", found.message])
            else:
                span = found.decide(self._task.no_answer_threshold)
                answers.append([span.text, span.start, span.end])
        return answers

    def compare(self, answers: Sequence[Any], recorded: Sequence[Any], precision: str) -> Verdict:
        same = share((str(answer), str(other)) for answer, other in zip(answers, recorded))
        least = SAME_ANSWERS[precision]
        return Verdict(
            same >= least, f"{same:.0%} of the answers equal the recorded ones", f"required: at least {least:.0%}"
        )
