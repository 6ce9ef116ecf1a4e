"""Text generation: a prompt in, an answer out, by a decoder-only language model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from deploykit.errors import UsageError
from deploykit.runtime.protobuf_text import quoted
from deploykit.runtime.sampling import Sampling, override
from deploykit.tasks.protocol import Answer, Evaluation, Grade, Progress
from deploykit.tasks.text_generation.facts import TextGeneration
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
    from deploykit.tasks.text_generation.generator import LocalGenerator, TextGenerator
    from deploykit.tasks.text_generation.options import TextGenerationOptions
    from deploykit.tasks.text_generation.training import TextGenerationStage
    from deploykit.tasks.types import ReportOptions

_NOT_LOADED = "the load on a served language model is not measured by this command"
_REMEDY = "use a load generator for language models, such as aiperf or guidellm, on deploykit serve --openai-port"


class _TextGeneration:
    name = TextGeneration.name
    facts = TextGeneration
    verb = "generate text"
    does = "generates text"
    auto_model = "AutoModelForCausalLM"
    heads = ("ForCausalLM", "LMHeadModel")
    model_types: tuple[str, ...] = ()
    shared_types: tuple[str, ...] = ()
    triton_backend = "deploykit.tasks.text_generation.triton_backend:TextGenerationBackend"
    outputs = ("text_output", "num_output_tokens")
    headline = "chrf"
    columns = ("prompt_column", "completion_column", "answer_regex", "syntax")
    input_columns = ("prompt_column",)
    answer_columns = ("answer", "finish", "tokens", "prompt_tokens")
    settings = ("max_rows", "max_cache_mb")
    instances = 1
    stream_backend = ""
    demo = "generation"
    commands: Mapping[str, Command] = {
        "generate": Command(
            "deploykit.tasks.text_generation.generate_command", "Answer prompts with a language model."
        ),
        "chat": Command("deploykit.tasks.text_generation.chat_command", "Chat with a language model."),
    }

    def read_facts(self, record: Mapping[str, Any]) -> TextGeneration:
        return TextGeneration(**{**record, "sampling": Sampling.from_record(record["sampling"])})

    def options(self) -> type[TextGenerationOptions]:
        from deploykit.tasks.text_generation.options import TextGenerationOptions

        return TextGenerationOptions

    def training_stage(self, options: TextGenerationOptions) -> TextGenerationStage:
        from deploykit.tasks.text_generation.training import TextGenerationStage

        return TextGenerationStage(options)

    def model_card(
        self, facts: TextGeneration, origin: str, metrics: Mapping[str, Any], held_out: str, rows: int
    ) -> tuple[list[str], list[str]]:
        from deploykit.tasks.text_generation import model_card

        return model_card.head(facts, origin), model_card.results(metrics, held_out) if held_out else []

    def demo_recipe(self, out: Path, *, max_rows: int | None, say: Callable[[str], None]) -> Recipe:
        from deploykit.tasks.text_generation.demo import recipe

        return recipe(out, max_rows=max_rows, say=say)

    def export_steps(self) -> ModuleType:
        from deploykit.tasks.text_generation import export

        return export

    def open_checkpoint(self, path: Path) -> LocalGenerator:
        from deploykit.tasks.text_generation.checkpoint import TorchGenerator

        return TorchGenerator.load(path)

    def open_graphs(self, path: Path, facts: TextGeneration, graphs: Graphs, threads: int | None) -> LocalGenerator:
        from deploykit.hardware import available_cpus
        from deploykit.tasks.text_generation.predictor import load_generator

        return load_generator(path, facts, graphs.engine, graphs.files[0], threads or available_cpus())

    def open_served(self, name: str, url: str) -> TextGenerator:
        from deploykit.tasks.text_generation.served import ServedGenerator

        return ServedGenerator(name, url)

    def open_drafted(
        self, path: Path, facts: TextGeneration, graphs: Graphs, threads: int | None, draft: Path
    ) -> LocalGenerator:
        from deploykit.hardware import available_cpus
        from deploykit.tasks.text_generation.draft_model import draft_weights
        from deploykit.tasks.text_generation.predictor import load_generator

        weights, _ = draft_weights(path, graphs.engine, draft)
        return load_generator(path, facts, graphs.engine, graphs.files[0], threads or available_cpus(), draft=weights)

    def draft_files(self, directory: Path, engine: str, draft: Path) -> tuple[dict[str, Path], str]:
        from deploykit.tasks.text_generation.draft_model import draft_weights
        from deploykit.tasks.text_generation.predictor import DRAFT_FILE

        weights, digest = draft_weights(directory, engine, draft)
        return {DRAFT_FILE: weights}, digest

    def tokenizer_files(self, files: Sequence[str]) -> Iterator[str]:
        from deploykit.tasks.text_generation.chat_template import FILE

        yield from (file for file in ("tokenizer.json", FILE) if file in files)

    def config_text(self, values: Mapping[str, Any], record: Mapping[str, Any], streams: str | None) -> str:
        from deploykit.tasks.text_generation.triton_config import TEXT_GENERATION

        return TEXT_GENERATION.substitute(values, task=quoted(record))

    def as_text(self, facts: TextGeneration, first: str, second: str) -> str:
        raise UsageError("the model reads one text, but two are given", "give texts, not pairs")

    def answer(
        self, predictor: TextGenerator, texts: Sequence[str], generation: Sampling | None = None
    ) -> list[Answer]:
        from deploykit.tasks.text_generation.evaluate import answers_to

        return [
            Answer(
                found.text,
                found.tokens,
                {
                    "answer": found.text,
                    "finish": found.finish,
                    "tokens": found.tokens,
                    "prompt_tokens": found.prompt_tokens,
                },
            )
            for found in answers_to(predictor, texts, generation)
        ]

    def stream(
        self, predictor: TextGenerator, prompt: str | Sequence[Mapping[str, Any]], generation: Sampling
    ) -> Iterator[str]:
        from deploykit.tasks.text_generation.generator import as_prompt

        return predictor.stream(as_prompt(predictor, prompt), generation)

    def explained_text(
        self, predictor: TextGenerator, text: str, answer: str | None, method: str, unit: Unit
    ) -> ExplainedText:
        from deploykit.tasks.text_generation.explain import explained_text

        return explained_text(predictor, text, answer, method, unit)

    def grade(
        self, predictor: TextGenerator, texts: Sequence[str], truth: Sequence[str], generation: Sampling | None
    ) -> Grade:
        from deploykit.tasks.text_generation.evaluate import grade

        return grade(predictor, texts, truth, generation)

    def evaluate(
        self, predictor: TextGenerator, source: str, *, split: str, reading: Reading, columns: Mapping[str, Any],
        generation: Mapping[str, Any], progress: Progress,
    ) -> Evaluation:  # fmt: skip
        from deploykit.tasks.text_generation.evaluate import evaluate_file

        sampling = self.override(predictor.task, generation)
        return evaluate_file(
            predictor, source, sampling, split=split, reading=reading, columns=columns, progress=progress
        )

    def report(
        self, predictor: TextGenerator, source: str, *, split: str, reading: Reading, columns: Mapping[str, Any],
        generation: Mapping[str, Any], options: ReportOptions, progress: Progress,
    ) -> tuple[Evaluation, dict[str, Any]]:  # fmt: skip
        from deploykit.tasks.text_generation.report import report

        return report(
            predictor, source, split=split, reading=reading, columns=columns, sampling=self.override(predictor.task, generation), options=options, progress=progress,
        )  # fmt: skip

    def write_report(self, title: str, record: Mapping[str, Any], out: Path) -> None:
        from deploykit.inspection.page import write_text_report

        write_text_report(title, record, out, correct="exact match", confidence="mean probability of a token")

    def read_inputs(
        self, source: str, facts: TextGeneration, *, reading: Reading, columns: Mapping[str, Any]
    ) -> Iterator[TextRow]:
        from deploykit.tasks.text_generation.generate import read_inputs

        return read_inputs(source, facts, columns.get("prompt_column"), reading)

    def read_texts(
        self, source: str, facts: TextGeneration, *, reading: Reading, columns: Mapping[str, Any]
    ) -> list[tuple[str, str | None]]:
        from deploykit.tasks.text_generation.evaluate import texts_and_references

        return texts_and_references(source, facts, reading, columns)

    def tensors(self, facts: TextGeneration, text: str) -> Mapping[str, str]:
        raise UsageError(_NOT_LOADED, _REMEDY)

    def request_parameters(self, facts: TextGeneration, generation: Sampling | None) -> dict[str, Any]:
        raise UsageError(_NOT_LOADED, _REMEDY)

    def override(self, facts: TextGeneration, generation: Mapping[str, Any]) -> Sampling:
        return override(facts.sampling, generation)

    def metrics_text(self, columns: Mapping[str, Mapping[str, Any]]) -> str:
        from deploykit.tasks.text_generation.metrics_text import metrics_text

        return metrics_text(columns)

    def result(self, facts: TextGeneration, metrics: Mapping[str, Any], held_out: str) -> tuple[dict[str, Any], str]:
        from deploykit.tasks.text_generation.metrics_text import result_text

        record = {"before": metrics.get("before", {}).get(held_out), "samples": metrics["samples"]}
        return record, result_text(metrics, held_out) if held_out else ""

    def describe(self, facts: TextGeneration) -> str:
        penalty = facts.sampling.repetition_penalty
        return (
            f"language model ({facts.family}), {facts.vocabulary:,} tokens; a context of {facts.max_length:,}, "
            f"answers end with {', '.join(map(str, facts.eos_token_ids))}"
            + (f"; repetition_penalty {penalty:g}" if penalty != 1 else "")
        )

    def bundle(self, facts: TextGeneration) -> BundledTask:
        raise UsageError("language models are not bundled for a Jetson yet", "package the export, and serve it")

    def within(self, facts: TextGeneration, limits: DecodeLimits) -> TextGeneration:
        return facts


TASK = _TextGeneration()
