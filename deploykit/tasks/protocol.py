"""Define what a task is: all that the stages know of it.

A task lives in one folder, whose ``task.py`` holds an object that satisfies ``Task``. The methods import what they
need when they run, so that a serving machine does not load the training half.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

if TYPE_CHECKING:
    from deploykit.runtime.engines.protocol import DecodeLimits
    from deploykit.runtime.find_graphs import Graphs
    from deploykit.tasks.bundle import BundledTask

GraphKind = Literal["encoder", "encoder-decoder", "decoder"]
"""What an export holds: one graph that reads texts, an encoder and a decoder that writes token by token, or one graph
that reads and writes."""


Progress = Callable[[int, int], None]
"""Called with the number of rows done and of all rows."""


class TaskFacts(Protocol):
    """The facts in a manifest: a frozen dataclass of JSON values and tuples, one for each task."""

    __dataclass_fields__: ClassVar[dict[str, Any]]
    name: ClassVar[str]
    graph_kind: ClassVar[GraphKind]

    @property
    def shape_limits(self) -> Mapping[str, int]:
        """The most that a model takes of each axis: tokens of a text (``length``), positions of a cache (``past``)."""

    @property
    def model_config(self) -> Mapping[str, Any]:
        """The fields of a Hugging Face configuration that the model's head needs."""


class Predictor(Protocol):
    """A model that answers, in this process or on a server."""

    @property
    def task(self) -> TaskFacts: ...

    def close(self) -> None:
        """Release connections."""


@dataclass(frozen=True)
class Evaluation:
    """The metrics of ``rows`` rows; ``skipped`` rows lacked a text or a right answer."""

    metrics: dict[str, Any]
    rows: int
    skipped: int


@dataclass(frozen=True)
class Answer:
    """An answer as one text; ``tokens`` are those of its own that a generating model wrote, otherwise 0."""

    text: str
    tokens: int = 0


@dataclass(frozen=True)
class Grade:
    """The answers to every text and their metrics. ``labels`` are a classifier's, None for other tasks."""

    labels: tuple[str, ...] | None
    answers: tuple[str, ...]
    metrics: Mapping[str, Any]


class Task(Protocol):
    """A task: its facts, and what each stage needs of it."""

    name: str
    facts: type[TaskFacts]
    verb: str
    does: str
    """What its models do, for messages: "classify" and "classifies"."""
    command: str
    """The command that asks its models: "predict"."""
    auto_model: str
    """The class of transformers that loads its checkpoints: "AutoModelForSequenceClassification"."""
    heads: tuple[str, ...]
    """How the classes end that a checkpoint's ``architectures`` name: "ForSequenceClassification"."""
    model_types: tuple[str, ...]
    """The model types that it takes, all of them its own; empty: every type that no other task claims."""
    triton_backend: str
    """The class that answers Triton's requests, as "module:class"; its ``outputs`` name the tensors."""
    outputs: tuple[str, ...]
    """The output tensors that a client needs, the answer's text first; ``TARGET_TOKENS`` counts what was generated."""
    headline: str
    """The metric that two models are compared by: "macro_f1"."""
    columns: tuple[str, ...]
    """The options that name columns of a data file, and that other tasks do not have: "label_column"."""
    settings: tuple[str, ...]
    """The serving settings that only some tasks have and this one does."""
    instances: int
    """Processes of a served model that do best by default."""
    stream_backend: str
    """The class behind NAME_stream, which sends an answer in parts; empty: there is no such model."""

    def read_facts(self, record: Mapping[str, Any]) -> TaskFacts:
        """Rebuild the facts from a manifest's JSON, whose lists are tuples. Raises KeyError or TypeError."""

    def options(self) -> type[Any]:
        """Return the dataclass of a fine-tuning run's options (``FinetuneOptions``)."""

    def training_stage(self, options: Any) -> Any:
        """Return what reads, cleans and splits the rows and trains (``deploykit.finetune.run.Stage``)."""

    def model_card(
        self, facts: Any, origin: str, metrics: Mapping[str, Any], held_out: str, rows: int
    ) -> tuple[list[str], list[str]]:
        """Return two parts of a checkpoint's README.md: its head with the hub's metadata, and its results."""

    def export_steps(self) -> ModuleType:
        """Return the module with ``write``, ``write_fp32`` and ``calibration_texts``."""

    def open_checkpoint(self, path: Path) -> Predictor:
        """Load a Hugging Face checkpoint in PyTorch."""

    def open_graphs(self, path: Path, facts: Any, graphs: Graphs, threads: int | None) -> Predictor:
        """Load an export or a packaged model in this process."""

    def open_served(self, name: str, url: str) -> Predictor:
        """Connect to a model on a running server."""

    def tokenizer_files(self, files: Sequence[str]) -> Iterator[str]:
        """Return those ``files`` of an export that its tokenizer is loaded from."""

    def config_text(self, values: Mapping[str, Any], record: Mapping[str, Any], streams: str | None) -> str:
        """Return config.pbtxt with the settings ``values`` and the facts' JSON ``record``.

        ``streams`` names the model whose answers the one described sends in parts.
        """

    def answer(self, predictor: Any, texts: Sequence[str], generation: Any = None) -> list[Answer]:
        """Ask for all texts in one call; ``generation`` replaces the model's own search."""

    def grade(self, predictor: Any, texts: Sequence[str], truth: Sequence[str], generation: Any) -> Grade:
        """Ask for all texts in calls of a usual size, and compare. Raises DataError for truth that no answer can be."""

    def evaluate(
        self,
        predictor: Any,
        source: str,
        *,
        split: str,
        encoding: str | None,
        columns: Mapping[str, Any],
        generation: Mapping[str, Any],
        progress: Progress,
    ) -> Evaluation:
        """Measure on the labelled rows of ``source``. ``columns`` are options of ``columns``, given or None."""

    def read_texts(
        self, source: str, facts: Any, *, encoding: str | None, columns: Mapping[str, Any]
    ) -> list[tuple[str, str | None]]:
        """Read texts, and their right answers where the source has them."""

    def request_parameters(self, facts: Any, generation: Any) -> dict[str, Any]:
        """Return the parameters of a request to Triton that searches as ``generation`` says; None: as the model does."""

    def override(self, facts: Any, generation: Mapping[str, Any]) -> Any:
        """Return the search that options of ``generation`` ask for; None for a task that does not generate."""

    def metrics_text(self, metrics: Mapping[str, Any]) -> str:
        """Return metrics as lines for a terminal."""

    def result(self, facts: Any, metrics: Mapping[str, Any], held_out: str) -> tuple[dict[str, Any], str]:
        """Return what ``finetune`` reports beside what every task has: for --json, and as lines for a terminal."""

    def describe(self, facts: Any) -> str:
        """Return a line for ``deploykit inspect``."""

    def bundle(self, facts: Any) -> BundledTask:
        """Return what a bundle for a Jetson needs."""

    def within(self, facts: Any, limits: DecodeLimits) -> TaskFacts:
        """Return facts whose lengths fit caches of a limited size."""
