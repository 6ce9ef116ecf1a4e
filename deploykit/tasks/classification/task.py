"""Classification: one label a text, or any number of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from deploykit.errors import UsageError
from deploykit.metric_titles import compared_lines, models_of
from deploykit.runtime.protobuf_text import quoted
from deploykit.tasks.classification.facts import Classification, as_text
from deploykit.tasks.protocol import Answer, Evaluation, Grade, Progress

if TYPE_CHECKING:
    from deploykit.attribution.explain import ExplainedText
    from deploykit.attribution.words import Unit
    from deploykit.data.reading import Reading
    from deploykit.data.texts import TextRow
    from deploykit.runtime.engines.protocol import DecodeLimits
    from deploykit.runtime.find_graphs import Graphs
    from deploykit.tasks.bundle import BundledTask
    from deploykit.tasks.classification.options import ClassificationOptions
    from deploykit.tasks.classification.predictor import TextClassifier
    from deploykit.tasks.classification.training import ClassificationStage
    from deploykit.tasks.demo_recipe import Recipe
    from deploykit.tasks.types import ReportOptions


class _Classification:
    name = Classification.name
    facts = Classification
    verb = "classify"
    does = "classifies"
    auto_model = "AutoModelForSequenceClassification"
    heads = ("ForSequenceClassification",)
    model_types: tuple[str, ...] = ()
    shared_types: tuple[str, ...] = ()
    triton_backend = "deploykit.tasks.classification.triton_backend:ClassificationBackend"
    outputs = ("LABEL", "SCORES")
    headline = "macro_f1"
    columns = ("text_column", "label_column")
    input_columns = ("text_column",)
    answer_columns = ("label", "score", "scores")
    settings = ("token_budget", "preferred_batch_size", "max_queue_delay_us", "queue_timeout_us")
    instances = 2
    stream_backend = ""
    counts_flips = True
    demo = "sentiment"

    def read_facts(self, record: Mapping[str, Any]) -> Classification:
        return Classification(**record)

    def options(self) -> type[ClassificationOptions]:
        from deploykit.tasks.classification.options import ClassificationOptions

        return ClassificationOptions

    def training_stage(self, options: ClassificationOptions) -> ClassificationStage:
        from deploykit.tasks.classification.training import ClassificationStage

        return ClassificationStage(options)

    def model_card(
        self, facts: Classification, origin: str, metrics: Mapping[str, Any], held_out: str, rows: int
    ) -> tuple[list[str], list[str]]:
        from deploykit.tasks.classification import model_card

        return model_card.head(facts, origin), model_card.results(metrics[held_out], rows) if held_out else []

    def demo_recipe(self, out: Path, *, max_rows: int | None, say: Callable[[str], None]) -> Recipe:
        from deploykit.tasks.classification.demo import recipe

        return recipe(out, max_rows=max_rows, say=say)

    def export_steps(self) -> ModuleType:
        from deploykit.tasks.classification import export

        return export

    def open_checkpoint(self, path: Path) -> TextClassifier:
        from deploykit.tasks.classification.checkpoint import TorchClassifier

        return TorchClassifier.load(path)

    def open_graphs(self, path: Path, facts: Classification, graphs: Graphs, threads: int | None) -> TextClassifier:
        from deploykit.runtime.engines import load_engine
        from deploykit.tasks.classification.predictor import load_classifier

        return load_classifier(path, facts, load_engine(graphs.engine, path / graphs.files[0], threads))

    def open_served(self, name: str, url: str) -> TextClassifier:
        from deploykit.tasks.classification.served import ServedClassifier

        return ServedClassifier(name, url)

    def tokenizer_files(self, files: Sequence[str]) -> Iterator[str]:
        yield "tokenizer.json"

    def config_text(self, values: Mapping[str, Any], record: Mapping[str, Any], streams: str | None) -> str:
        from deploykit.tasks.classification.triton_config import CLASSIFICATION, PAIR

        labels = record["labels"]
        rest = {name: value for name, value in record.items() if name != "labels"}
        pair = PAIR if record.get("pair") else ""
        return CLASSIFICATION.substitute(
            values, pair=pair, num_labels=len(labels), labels=quoted(labels), task=quoted(rest)
        )

    def as_text(self, facts: Classification, first: str, second: str) -> str:
        if not facts.pair:
            raise UsageError(
                "the model reads one text, but two are given",
                "give texts; export a checkpoint of pairs with two --text-column",
            )
        return as_text(first, second)

    def answer(self, predictor: TextClassifier, texts: Sequence[str], generation: None = None) -> list[Answer]:
        from deploykit.tasks.classification.answer_texts import answer_texts

        return answer_texts(predictor, texts)

    def explained_text(
        self, predictor: TextClassifier, text: str, answer: str | None, method: str, unit: Unit
    ) -> ExplainedText:
        from deploykit.tasks.classification.explain import explained_text

        return explained_text(predictor, text, answer, method, unit)

    def grade(self, predictor: TextClassifier, texts: Sequence[str], truth: Sequence[str], generation: None) -> Grade:
        from deploykit.tasks.classification.evaluate import grade

        return grade(predictor, texts, truth)

    def evaluate(
        self, predictor: TextClassifier, source: str, *, split: str, reading: Reading, columns: Mapping[str, Any],
        generation: Mapping[str, Any], progress: Progress,
    ) -> Evaluation:  # fmt: skip
        from deploykit.tasks.classification.evaluate import evaluate, labelled_rows

        rows = labelled_rows(
            source, predictor.task, text_columns=columns.get("text_column") or (),
            label_columns=columns.get("label_column") or (), reading=reading, split=split,
        )  # fmt: skip
        reading.stop_at(rows.problems)
        return evaluate(predictor, rows, progress=progress)

    def report(
        self, predictor: TextClassifier, source: str, *, split: str, reading: Reading, columns: Mapping[str, Any],
        generation: Mapping[str, Any], options: ReportOptions, progress: Progress,
    ) -> tuple[Evaluation, dict[str, Any]]:  # fmt: skip
        from deploykit.tasks.classification.inspection.report import report

        return report(
            predictor, source, split=split, reading=reading, columns=columns, options=options, progress=progress
        )

    def write_report(self, title: str, record: Mapping[str, Any], out: Path) -> None:
        from deploykit.tasks.classification.inspection.page import write_report

        write_report(title, record, out)

    def read_inputs(
        self, source: str, facts: Classification, *, reading: Reading, columns: Mapping[str, Any]
    ) -> Iterator[TextRow]:
        from deploykit.data.texts import read_texts, trained_columns
        from deploykit.tasks.classification.pairs import check_columns, read_pairs

        check_columns(facts, columns.get("text_column") or ())
        chosen = trained_columns(source, columns.get("text_column") or (), facts.text_columns, reading)
        if facts.pair:
            return read_pairs(source, chosen, reading)
        return read_texts(source, chosen, facts.text_separator, reading=reading)

    def read_texts(
        self, source: str, facts: Classification, *, reading: Reading, columns: Mapping[str, Any]
    ) -> list[tuple[str, str | None]]:
        from deploykit.tasks.classification.evaluate import texts_and_labels

        return texts_and_labels(
            source, facts, columns.get("text_column") or (), columns.get("label_column") or (), reading
        )

    def tensors(self, facts: Classification, text: str) -> Mapping[str, str]:
        return dict(zip(("TEXT", "TEXT_PAIR"), facts.read(text))) if facts.pair else {"TEXT": text}

    def request_parameters(self, facts: Classification, generation: None) -> dict[str, Any]:
        return {}

    def override(self, facts: Classification, generation: Mapping[str, Any]) -> None:
        if generation:
            raise UsageError(f"{next(iter(generation))} is for a model that generates", "leave it out")

    def metrics_text(self, columns: Mapping[str, Mapping[str, Any]]) -> str:
        from deploykit.tasks.classification.metrics_text import metrics_text
        from deploykit.text_table import stacked

        return stacked({name: metrics_text(metrics) for name, metrics in columns.items()})

    def result(self, facts: Classification, metrics: Mapping[str, Any], held_out: str) -> tuple[dict[str, Any], str]:
        from deploykit.tasks.classification.metrics_text import qat_text

        record: dict[str, Any] = {"labels": list(facts.labels)}
        text = (
            "\n".join([self.metrics_text(models_of(metrics, held_out)), *compared_lines(metrics)]) if held_out else ""
        )
        if "qat" not in metrics:
            return record, text
        return {**record, "qat": metrics["qat"]}, f"{text}\n\n{qat_text(metrics['qat'])}"

    def describe(self, facts: Classification) -> str:
        if facts.regression:
            return f"gives    a number, {facts.labels[0]}; {'pairs of texts, ' if facts.pair else ''}at most {facts.max_length} tokens"
        multi, pairs = " (multi-label)" if facts.multi_label else "", "pairs of texts, " if facts.pair else ""
        return f"labels   {', '.join(facts.labels)}{multi}; {pairs}at most {facts.max_length} tokens"

    def bundle(self, facts: Classification) -> BundledTask:
        from deploykit.tasks.classification.bundle import BundledClassifier

        return BundledClassifier(facts)

    def within(self, facts: Classification, limits: DecodeLimits) -> Classification:
        return facts


TASK = _Classification()
