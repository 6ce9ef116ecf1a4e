"""Define the task of token classification, which labels each word of a text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from deploykit.errors import UsageError
from deploykit.runtime.protobuf_text import quoted
from deploykit.tasks.protocol import Answer, Evaluation, Grade, Progress
from token_classification.facts import TokenClassification

if TYPE_CHECKING:
    from deploykit.data.reading import Reading
    from deploykit.data.texts import TextRow
    from deploykit.runtime.engines.protocol import DecodeLimits
    from deploykit.runtime.find_graphs import Graphs
    from deploykit.tasks.bundle import BundledTask
    from token_classification.options import TokenClassificationOptions
    from token_classification.tagger import TextTagger
    from token_classification.training import TokenClassificationStage


class _TokenClassification:
    name = TokenClassification.name
    facts = TokenClassification
    verb = "label words"
    does = "labels words"
    auto_model = "AutoModelForTokenClassification"
    heads = ("ForTokenClassification",)
    model_types: tuple[str, ...] = ()
    shared_types: tuple[str, ...] = ()
    triton_backend = "token_classification.triton_backend:TokenClassificationBackend"
    stream_backend = ""
    outputs = ("LABELS", "ERROR")
    settings = ("token_budget", "preferred_batch_size", "max_queue_delay_us", "queue_timeout_us")
    instances = 2
    headline = "entity_f1"
    columns = ("words_column", "label_column")
    input_columns = ("words_column",)
    answer_columns = ("words", "labels", "entities")

    def read_facts(self, record: Mapping[str, Any]) -> TokenClassification:
        return TokenClassification(**record)

    def describe(self, facts: TokenClassification) -> str:
        return f"labels   {', '.join(facts.labels)}, one a word; at most {facts.max_length} tokens"

    def options(self) -> type[TokenClassificationOptions]:
        from token_classification.options import TokenClassificationOptions

        return TokenClassificationOptions

    def training_stage(self, options: TokenClassificationOptions) -> TokenClassificationStage:
        from token_classification.training import TokenClassificationStage

        return TokenClassificationStage(options)

    def model_card(
        self, facts: TokenClassification, origin: str, metrics: Mapping[str, Any], held_out: str, rows: int
    ) -> tuple[list[str], list[str]]:
        from token_classification import model_card

        return model_card.head(facts, origin), model_card.results(metrics[held_out], rows) if held_out else []

    def result(
        self, facts: TokenClassification, metrics: Mapping[str, Any], held_out: str
    ) -> tuple[dict[str, Any], str]:
        return {"labels": list(facts.labels)}, self.metrics_text({"": metrics[held_out]}) if held_out else ""

    def export_steps(self) -> ModuleType:
        from token_classification import export

        return export

    def tokenizer_files(self, files: Sequence[str]) -> Iterator[str]:
        yield "tokenizer.json"

    def bundle(self, facts: TokenClassification) -> BundledTask:
        raise UsageError("token classification has no bundle for a Jetson", "use deploykit package and deploykit serve")

    def within(self, facts: TokenClassification, limits: DecodeLimits) -> TokenClassification:
        return facts

    def config_text(self, values: Mapping[str, Any], record: Mapping[str, Any], streams: str | None) -> str:
        from token_classification.triton_config import TOKEN_CLASSIFICATION

        return TOKEN_CLASSIFICATION.substitute(values, task=quoted(record))

    def open_checkpoint(self, path: Path) -> TextTagger:
        from token_classification.checkpoint import TorchTagger

        return TorchTagger.load(path)

    def open_graphs(self, path: Path, facts: TokenClassification, graphs: Graphs, threads: int | None) -> TextTagger:
        from deploykit.runtime.engines import load_engine
        from token_classification.tagger import load_tagger

        return load_tagger(path, facts, load_engine(graphs.engine, path / graphs.files[0], threads))

    def open_served(self, name: str, url: str) -> TextTagger:
        from token_classification.served import ServedTagger

        return ServedTagger(name, url)

    def read_inputs(
        self, source: str, facts: TokenClassification, *, reading: Reading, columns: Mapping[str, Any]
    ) -> Iterator[TextRow]:
        from token_classification.rows import read_inputs

        return read_inputs(source, columns.get("words_column"), facts.words_column, reading)

    def read_texts(
        self, source: str, facts: TokenClassification, *, reading: Reading, columns: Mapping[str, Any]
    ) -> list[tuple[str, str | None]]:
        from token_classification.evaluate import texts_and_labels

        return texts_and_labels(source, facts, columns.get("words_column"), columns.get("label_column"), reading)

    def as_text(self, facts: TokenClassification, first: str, second: str) -> str:
        raise UsageError("the model reads one text, but two are given", "give texts, not pairs")

    def answer(self, predictor: TextTagger, texts: Sequence[str], generation: None = None) -> list[Answer]:
        from token_classification.evaluate import answers

        return answers(predictor, texts)

    def grade(self, predictor: TextTagger, texts: Sequence[str], truth: Sequence[str], generation: None) -> Grade:
        from token_classification.evaluate import grade

        return grade(predictor, texts, truth)

    def evaluate(
        self, predictor: TextTagger, source: str, *, split: str, reading: Reading, columns: Mapping[str, Any],
        generation: Mapping[str, Any], progress: Progress,
    ) -> Evaluation:  # fmt: skip
        from token_classification.evaluate import evaluate, labelled_rows

        rows = labelled_rows(
            source, predictor.task, columns.get("words_column"), columns.get("label_column"), reading, split
        )
        return evaluate(predictor, rows, progress)

    def metrics_text(self, columns: Mapping[str, Mapping[str, Any]]) -> str:
        from deploykit.text_table import stacked
        from token_classification.entities import metrics_text

        return stacked({name: metrics_text(metrics) for name, metrics in columns.items()})

    def override(self, facts: TokenClassification, generation: Mapping[str, Any]) -> None:
        if generation:
            raise UsageError(f"{next(iter(generation))} is for a model that generates", "leave it out")

    def tensors(self, facts: TokenClassification, text: str) -> Mapping[str, str]:
        return {"TEXT": text}

    def request_parameters(self, facts: TokenClassification, generation: None) -> dict[str, Any]:
        return {}


TASK = _TokenClassification()
