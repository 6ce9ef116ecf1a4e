"""Define the task of extractive question answering: answer a question with words of its context.

In stages whose inputs are texts, a text is a JSON object with both (``facts.as_text``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from deploykit.errors import UsageError
from deploykit.metric_titles import compared_lines, models_of
from deploykit.runtime.protobuf_text import quoted
from deploykit.tasks.protocol import Answer, Evaluation, Grade, Progress
from deploykit.tasks.question_answering.facts import MOST_ANSWERS, QuestionAnswering, as_text, from_text
from deploykit.tasks.types import Command

if TYPE_CHECKING:
    from deploykit.attribution.explain import ExplainedText
    from deploykit.attribution.words import Unit
    from deploykit.data.reading import Reading
    from deploykit.data.texts import TextRow
    from deploykit.runtime.engines.protocol import DecodeLimits
    from deploykit.runtime.find_graphs import Graphs
    from deploykit.tasks.bundle import BundledTask
    from deploykit.tasks.question_answering.options import QuestionAnsweringOptions
    from deploykit.tasks.question_answering.predictor import TextAnswerer
    from deploykit.tasks.question_answering.training import QuestionAnsweringStage
    from deploykit.tasks.types import ReportOptions


class _QuestionAnswering:
    name = QuestionAnswering.name
    facts = QuestionAnswering
    verb = "answer questions"
    does = "answers questions"
    auto_model = "AutoModelForQuestionAnswering"
    heads = ("ForQuestionAnswering", "ForQuestionAnsweringSimple")
    model_types: tuple[str, ...] = ()
    shared_types: tuple[str, ...] = ()
    triton_backend = "deploykit.tasks.question_answering.triton_backend:QuestionAnsweringBackend"
    outputs = ("ANSWER", "START", "END", "SCORE")
    headline = "f1"
    columns: tuple[str, ...] = ()
    input_columns: tuple[str, ...] = ()
    answer_columns = ("answer", "start", "end", "score")
    settings = ("token_budget", "preferred_batch_size", "max_queue_delay_us", "queue_timeout_us")
    instances = 2
    stream_backend = ""
    commands: Mapping[str, Command] = {
        "answer": Command(
            "deploykit.tasks.question_answering.answer_command",
            "Answer questions about a text, with the positions of the answers.",
        ),
    }

    def read_facts(self, record: Mapping[str, Any]) -> QuestionAnswering:
        return QuestionAnswering(**record)

    def options(self) -> type[QuestionAnsweringOptions]:
        from deploykit.tasks.question_answering.options import QuestionAnsweringOptions

        return QuestionAnsweringOptions

    def training_stage(self, options: QuestionAnsweringOptions) -> QuestionAnsweringStage:
        from deploykit.tasks.question_answering.training import QuestionAnsweringStage

        return QuestionAnsweringStage(options)

    def model_card(
        self, facts: QuestionAnswering, origin: str, metrics: Mapping[str, Any], held_out: str, rows: int
    ) -> tuple[list[str], list[str]]:
        from deploykit.tasks.question_answering import model_card

        return model_card.head(facts, origin), model_card.results(metrics[held_out], rows) if held_out else []

    def export_steps(self) -> ModuleType:
        from deploykit.tasks.question_answering import export

        return export

    def open_checkpoint(self, path: Path) -> TextAnswerer:
        from deploykit.tasks.question_answering.checkpoint import TorchAnswerer

        return TorchAnswerer.load(path)

    def open_graphs(self, path: Path, facts: QuestionAnswering, graphs: Graphs, threads: int | None) -> TextAnswerer:
        from deploykit.runtime.engines import load_engine
        from deploykit.tasks.question_answering.predictor import load_answerer

        return load_answerer(path, facts, load_engine(graphs.engine, path / graphs.files[0], threads))

    def open_served(self, name: str, url: str) -> TextAnswerer:
        from deploykit.tasks.question_answering.served import ServedAnswerer

        return ServedAnswerer(name, url)

    def tokenizer_files(self, files: Sequence[str]) -> Iterator[str]:
        yield "tokenizer.json"

    def config_text(self, values: Mapping[str, Any], record: Mapping[str, Any], streams: str | None) -> str:
        from deploykit.tasks.question_answering.triton_config import QUESTION_ANSWERING

        return QUESTION_ANSWERING.substitute(values, task=quoted(record))

    def as_text(self, facts: QuestionAnswering, first: str, second: str) -> str:
        return as_text(first, second)

    def answer(self, predictor: TextAnswerer, texts: Sequence[str], generation: int | None = None) -> list[Answer]:
        """Answer questions; ``generation`` is the number of answers to each."""
        from deploykit.tasks.question_answering.answer_texts import answer_texts

        return answer_texts(predictor, texts, generation)

    def explained_text(
        self, predictor: TextAnswerer, text: str, answer: str | None, method: str, unit: Unit
    ) -> ExplainedText:
        from deploykit.tasks.question_answering.explain import explained_text

        return explained_text(predictor, text, answer, method, unit)

    def grade(self, predictor: TextAnswerer, texts: Sequence[str], truth: Sequence[str], generation: None) -> Grade:
        from deploykit.tasks.question_answering.evaluate import grade

        return grade(predictor, texts, truth)

    def evaluate(
        self, predictor: TextAnswerer, source: str, *, split: str, reading: Reading, columns: Mapping[str, Any],
        generation: Mapping[str, Any], progress: Progress,
    ) -> Evaluation:  # fmt: skip
        from deploykit.tasks.question_answering.evaluate import evaluate, labelled_questions

        rows = labelled_questions(source, reading=reading, split=split)
        reading.stop_at(rows.problems)
        return evaluate(predictor, rows, progress=progress)

    def report(
        self, predictor: TextAnswerer, source: str, *, split: str, reading: Reading, columns: Mapping[str, Any],
        generation: Mapping[str, Any], options: ReportOptions, progress: Progress,
    ) -> tuple[Evaluation, dict[str, Any]]:  # fmt: skip
        from deploykit.tasks.question_answering.report import report

        return report(
            predictor, source, split=split, reading=reading, columns=columns, options=options, progress=progress,
        )  # fmt: skip

    def write_report(self, title: str, record: Mapping[str, Any], out: Path) -> None:
        from deploykit.inspection.page import write_text_report

        write_text_report(title, record, out, correct="exact match", confidence="score of the answer")

    def read_inputs(
        self, source: str, facts: QuestionAnswering, *, reading: Reading, columns: Mapping[str, Any]
    ) -> Iterator[TextRow]:
        from deploykit.tasks.question_answering.rows import read_inputs

        return read_inputs(source, reading)

    def read_texts(
        self, source: str, facts: QuestionAnswering, *, reading: Reading, columns: Mapping[str, Any]
    ) -> list[tuple[str, str | None]]:
        from deploykit.tasks.question_answering.evaluate import texts_and_answers

        return texts_and_answers(source, reading)

    def tensors(self, facts: QuestionAnswering, text: str) -> Mapping[str, str]:
        question, context = from_text(text)
        return {"QUESTION": question, "CONTEXT": context}

    def request_parameters(self, facts: QuestionAnswering, generation: None) -> dict[str, Any]:
        return {}

    def override(self, facts: QuestionAnswering, generation: Mapping[str, Any]) -> int | None:
        """Return the number of answers, ``top_k``, where it is given."""
        if unknown := [name for name in generation if name != "top_k"]:
            raise UsageError(f"{unknown[0]} is for a model that generates", "leave it out, or give top_k")
        top_k = generation.get("top_k")
        if top_k is not None and (
            isinstance(top_k, bool) or not isinstance(top_k, int) or not 1 <= top_k <= MOST_ANSWERS
        ):
            raise UsageError(f"top_k is {top_k!r}", f"give a whole number from 1 to {MOST_ANSWERS}")
        return top_k

    def metrics_text(self, columns: Mapping[str, Mapping[str, Any]]) -> str:
        from deploykit.tasks.question_answering.metrics_text import metrics_text
        from deploykit.text_table import stacked

        return stacked({name: metrics_text(metrics) for name, metrics in columns.items()})

    def result(self, facts: QuestionAnswering, metrics: Mapping[str, Any], held_out: str) -> tuple[dict[str, Any], str]:
        record = {"whole_words": facts.whole_words, "no_answer_threshold": facts.no_answer_threshold}
        if not held_out:
            return record, ""
        return record, "\n".join([self.metrics_text(models_of(metrics, held_out)), *compared_lines(metrics)])

    def describe(self, facts: QuestionAnswering) -> str:
        threshold = facts.no_answer_threshold
        none = "every question is answered" if threshold is None else f"no answer above log-odds of {threshold:.2f}"
        return (
            f"answers  of at most {facts.max_answer_length} tokens; {none}; windows of {facts.max_length} tokens, "
            f"{facts.doc_stride} shared"
        )

    def bundle(self, facts: QuestionAnswering) -> BundledTask:
        from deploykit.tasks.question_answering.bundle import BundledAnswerer

        return BundledAnswerer(facts)

    def within(self, facts: QuestionAnswering, limits: DecodeLimits) -> QuestionAnswering:
        return facts


TASK = _QuestionAnswering()
