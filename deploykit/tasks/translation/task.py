"""Define the translation task."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from deploykit.errors import UsageError
from deploykit.runtime.generation import Generation, override
from deploykit.runtime.protobuf_text import quoted
from deploykit.tasks.protocol import Answer, Evaluation, Grade, Progress
from deploykit.tasks.translation.facts import Translation
from deploykit.tasks.types import Command

if TYPE_CHECKING:
    from deploykit.attribution.explain import ExplainedText
    from deploykit.attribution.words import Unit
    from deploykit.data.reading import Reading
    from deploykit.data.texts import TextRow
    from deploykit.runtime.engines.protocol import DecodeLimits
    from deploykit.runtime.find_graphs import Graphs
    from deploykit.tasks.bundle import BundledTask
    from deploykit.tasks.demo_recipe import Recipe
    from deploykit.tasks.translation.options import TranslationOptions
    from deploykit.tasks.translation.predictor import TextTranslator
    from deploykit.tasks.translation.training import TranslationStage
    from deploykit.tasks.types import ReportOptions


class _Translation:
    name = Translation.name
    facts = Translation
    verb = "translate"
    does = "translates"
    auto_model = "AutoModelForSeq2SeqLM"
    heads = ("ForConditionalGeneration", "MTModel", "MTHeadModel")
    model_types = ("marian", "m2m_100", "t5", "mt5")
    shared_types = ("bart", "mbart")  # classifiers use these too
    triton_backend = "deploykit.tasks.translation.triton_backend:TranslationBackend"
    outputs = ("TRANSLATION", "TARGET_TOKENS")
    headline = "chrf"
    columns = ("source_column", "target_column")
    input_columns = ("source_column",)
    answer_columns = ("translation", "source_tokens", "target_tokens", "finish")
    settings = ("max_rows", "max_cache_mb", "long_input", "split", "in_flight")
    instances = 1
    stream_backend = "deploykit.tasks.translation.triton_stream:StreamBackend"
    demo = "translation"
    commands: Mapping[str, Command] = {
        "translate": Command(
            "deploykit.tasks.translation.translate_command",
            "Translate texts with a served or local model.",
            ("tritonclient", "sentencepiece"),
        ),
    }

    def read_facts(self, record: Mapping[str, Any]) -> Translation:
        return Translation(**{**record, "generation": Generation(**record["generation"])})

    def options(self) -> type[TranslationOptions]:
        from deploykit.tasks.translation.options import TranslationOptions

        return TranslationOptions

    def training_stage(self, options: TranslationOptions) -> TranslationStage:
        from deploykit.tasks.translation.training import TranslationStage

        return TranslationStage(options)

    def model_card(
        self, facts: Translation, origin: str, metrics: Mapping[str, Any], held_out: str, rows: int
    ) -> tuple[list[str], list[str]]:
        from deploykit.tasks.translation import model_card

        return model_card.head(facts, origin), model_card.results(metrics, held_out) if held_out else []

    def demo_recipe(self, out: Path, *, max_rows: int | None, say: Callable[[str], None]) -> Recipe:
        from deploykit.tasks.translation.demo import recipe

        return recipe(out, max_rows=max_rows, say=say)

    def export_steps(self) -> ModuleType:
        from deploykit.tasks.translation import export

        return export

    def open_checkpoint(self, path: Path) -> TextTranslator:
        from deploykit.tasks.translation.checkpoint import TorchTranslator

        return TorchTranslator.load(path)

    def open_graphs(self, path: Path, facts: Translation, graphs: Graphs, threads: int | None) -> TextTranslator:
        from deploykit.hardware import available_cpus
        from deploykit.tasks.translation.predictor import load_translator

        return load_translator(path, facts, graphs.files, threads or available_cpus(), engine=graphs.engine)

    def open_served(self, name: str, url: str) -> TextTranslator:
        from deploykit.tasks.translation.served import ServedTranslator

        return ServedTranslator(name, url)

    def tokenizer_files(self, files: Sequence[str]) -> Iterator[str]:
        from deploykit.tasks.translation import tokenizer as names

        all_files = (names.RECORD, names.TOKENIZER, names.SOURCE_SPM, names.TARGET_SPM, names.VOCABULARY, names.TOKENS)
        yield from (file for file in all_files if file in files)

    def config_text(self, values: Mapping[str, Any], record: Mapping[str, Any], streams: str | None) -> str:
        from deploykit.tasks.translation.triton_config import STREAM, TRANSLATION

        if streams is not None:
            return STREAM.substitute(streams=streams, task=quoted(record))
        return TRANSLATION.substitute(values, task=quoted(record))

    def as_text(self, facts: Translation, first: str, second: str) -> str:
        raise UsageError("the model reads one text, but two are given", "give texts, not pairs")

    def answer(
        self, predictor: TextTranslator, texts: Sequence[str], generation: Generation | None = None
    ) -> list[Answer]:
        # Without scores greedy search is faster.
        return [
            Answer(
                t.text,
                t.target_tokens,
                {
                    "translation": t.text,
                    "source_tokens": t.source_tokens,
                    "target_tokens": t.target_tokens,
                    "finish": t.finish,
                },
            )
            for t in predictor.translate(texts, generation, scored=False)
        ]

    def explained_text(
        self, predictor: TextTranslator, text: str, answer: str | None, method: str, unit: Unit
    ) -> ExplainedText:
        from deploykit.tasks.translation.explain import explained_text

        return explained_text(predictor, text, answer, method, unit)

    def grade(
        self, predictor: TextTranslator, texts: Sequence[str], truth: Sequence[str], generation: Generation | None
    ) -> Grade:
        from deploykit.tasks.translation.evaluate import grade

        return grade(predictor, texts, truth, generation)

    def evaluate(
        self, predictor: TextTranslator, source: str, *, split: str, reading: Reading, columns: Mapping[str, Any],
        generation: Mapping[str, Any], progress: Progress,
    ) -> Evaluation:  # fmt: skip
        from deploykit.tasks.translation.evaluate import evaluate_translator, translated_rows

        pairs = translated_rows(
            source, predictor.task, source_column=columns.get("source_column"),
            target_column=columns.get("target_column"), reading=reading, split=split,
        )  # fmt: skip
        reading.stop_at(pairs.problems)
        return evaluate_translator(predictor, pairs, self.override(predictor.task, generation), progress=progress)

    def report(
        self, predictor: TextTranslator, source: str, *, split: str, reading: Reading, columns: Mapping[str, Any],
        generation: Mapping[str, Any], options: ReportOptions, progress: Progress,
    ) -> tuple[Evaluation, dict[str, Any]]:  # fmt: skip
        from deploykit.tasks.translation.report import report

        return report(
            predictor, source, split=split, reading=reading, columns=columns, generation=self.override(predictor.task, generation), options=options, progress=progress,
        )  # fmt: skip

    def write_report(self, title: str, record: Mapping[str, Any], out: Path) -> None:
        from deploykit.inspection.page import write_text_report

        write_text_report(title, record, out)

    def read_inputs(
        self, source: str, facts: Translation, *, reading: Reading, columns: Mapping[str, Any]
    ) -> Iterator[TextRow]:
        from deploykit.tasks.translation.read_pairs import read_sources

        return read_sources(
            source,
            column=columns.get("source_column"),
            source=facts.source,
            prefer=facts.source_column,
            reading=reading,
        )

    def read_texts(
        self, source: str, facts: Translation, *, reading: Reading, columns: Mapping[str, Any]
    ) -> list[tuple[str, str | None]]:
        from deploykit.tasks.translation.evaluate import texts_and_references

        return texts_and_references(source, facts, columns.get("source_column"), columns.get("target_column"), reading)

    def tensors(self, facts: Translation, text: str) -> Mapping[str, str]:
        return {"TEXT": text}

    def request_parameters(self, facts: Translation, generation: Generation | None) -> dict[str, Any]:
        from deploykit.tasks.translation.served import request_parameters

        return request_parameters(facts, generation or facts.generation)

    def override(self, facts: Translation, generation: Mapping[str, Any]) -> Generation:
        return override(facts, generation)

    def metrics_text(self, columns: Mapping[str, Mapping[str, Any]]) -> str:
        from deploykit.tasks.translation.metrics_text import metrics_text

        return metrics_text(columns)

    def result(self, facts: Translation, metrics: Mapping[str, Any], held_out: str) -> tuple[dict[str, Any], str]:
        from deploykit.tasks.translation.metrics_text import result_text

        record = {"before": metrics.get("before", {}).get(held_out), "samples": metrics["samples"]}
        return record, result_text(metrics, held_out) if held_out else ""

    def describe(self, facts: Translation) -> str:
        search = "greedy search" if facts.generation.beam_size == 1 else f"{facts.generation.beam_size} beams"
        return (
            f"language {facts.source} to {facts.target} ({facts.family}), {facts.vocabulary:,} pieces; at most "
            f"{facts.max_source_length} tokens in and {facts.generation.max_length} out, {search}"
        )

    def bundle(self, facts: Translation) -> BundledTask:
        from deploykit.tasks.translation.bundle import BundledTranslator

        return BundledTranslator(facts)

    def within(self, facts: Translation, limits: DecodeLimits) -> Translation:
        from deploykit.tasks.translation.predictor import within

        return within(facts, limits)


TASK = _Translation()
