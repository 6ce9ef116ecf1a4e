"""Define what a task is: all that the stages know of it.

A task is one object with the members of ``Task``, in ``task.py`` of a folder of its own. Methods import what they need
when they run, so that a serving machine does not load the training half.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol

from deploykit.tasks.types import Answer, Evaluation, Grade, GraphKind, Predictor, Progress, TaskFacts

if TYPE_CHECKING:
    from deploykit.data.texts import TextRow
    from deploykit.runtime.engines.protocol import DecodeLimits
    from deploykit.runtime.find_graphs import Graphs
    from deploykit.tasks.bundle import BundledTask

__all__ = ["Answer", "Evaluation", "Grade", "GraphKind", "Predictor", "Progress", "Task", "TaskFacts"]


class Training(Protocol):
    """What ``finetune`` needs, and how a checkpoint is known to be for the task."""

    auto_model: str
    """The class of transformers that loads its checkpoints: "AutoModelForSequenceClassification"."""
    heads: tuple[str, ...]
    """How the classes end that a checkpoint's ``architectures`` name: "ForSequenceClassification"."""
    model_types: tuple[str, ...]
    """The model types that are its own; empty: every type that no other task claims."""
    shared_types: tuple[str, ...]
    """The model types that it takes beside its own, and leaves to other tasks too."""

    def options(self) -> type[Any]:
        """Return the dataclass of a run's options (``FinetuneOptions``); its new fields become options of ``finetune``."""

    def training_stage(self, options: Any) -> Any:
        """Return what reads, cleans and splits the rows and trains (``deploykit.stages.finetune.Stage``)."""

    def model_card(
        self, facts: Any, origin: str, metrics: Mapping[str, Any], held_out: str, rows: int
    ) -> tuple[list[str], list[str]]:
        """Return two parts of a checkpoint's README.md: its head with the hub's metadata, and its results."""

    def result(self, facts: Any, metrics: Mapping[str, Any], held_out: str) -> tuple[dict[str, Any], str]:
        """Return what ``finetune`` reports beside what every task has: for --json, and as lines for a terminal."""


class Exporting(Protocol):
    """What ``export``, ``calibrate``, ``package`` and ``bundle`` need."""

    def export_steps(self) -> ModuleType:
        """Return the module with ``write``, ``write_fp32``, ``calibration_texts`` and ``calibrate``."""

    def tokenizer_files(self, files: Sequence[str]) -> Iterator[str]:
        """Return those ``files`` of an export that its tokenizer is loaded from."""

    def bundle(self, facts: Any) -> BundledTask:
        """Return what a bundle for a Jetson needs. Raises UsageError where there is none."""

    def within(self, facts: Any, limits: DecodeLimits) -> TaskFacts:
        """Return facts whose lengths fit caches of a limited size."""


class Serving(Protocol):
    """What opens and serves a model. None of it imports torch or transformers, but for ``open_checkpoint``."""

    triton_backend: str
    """The class that answers Triton's requests, as "module:class"; its ``outputs`` name the tensors."""
    stream_backend: str
    """The class behind NAME_stream, which sends an answer in parts; empty: there is no such model."""
    outputs: tuple[str, ...]
    """The output tensors that a client needs, the answer's text first; ``TARGET_TOKENS`` counts what was generated."""
    settings: tuple[str, ...]
    """The serving settings that only some tasks have and this one does."""
    instances: int
    """Processes of a served model that do best by default."""

    def config_text(self, values: Mapping[str, Any], record: Mapping[str, Any], streams: str | None) -> str:
        """Return config.pbtxt with the settings ``values`` and the facts' JSON ``record``; of NAME_stream, ``streams``
        is the model whose answers it sends."""

    def open_checkpoint(self, path: Path) -> Predictor:
        """Load a Hugging Face checkpoint in PyTorch."""

    def open_graphs(self, path: Path, facts: Any, graphs: Graphs, threads: int | None) -> Predictor:
        """Load an export or a packaged model in this process."""

    def open_served(self, name: str, url: str) -> Predictor:
        """Connect to a model on a running server."""


class Measuring(Protocol):
    """What ``predict``, ``evaluate``, ``bench`` and ``tune`` need. A ``generation`` replaces a model's own search."""

    headline: str
    """The metric that two models are compared by: "macro_f1"."""
    columns: tuple[str, ...]
    """The options that name columns of a data file: "text_column", "label_column"."""
    input_columns: tuple[str, ...]
    """Those of them that a text is read from."""

    def read_inputs(
        self, source: str, facts: Any, *, encoding: str | None, columns: Mapping[str, Any]
    ) -> Iterator[TextRow]:
        """Stream the texts to answer: a row for every row of ``source``, with its text or the problem with it."""

    def read_texts(
        self, source: str, facts: Any, *, encoding: str | None, columns: Mapping[str, Any]
    ) -> list[tuple[str, str | None]]:
        """Read texts, and their right answers where the source has them."""

    def answer(self, predictor: Any, texts: Sequence[str], generation: Any = None) -> list[Answer]:
        """Ask for all texts in one call."""

    def grade(self, predictor: Any, texts: Sequence[str], truth: Sequence[str], generation: Any) -> Grade:
        """Ask for all texts in calls of a usual size, and compare. Raises DataError for truth that no answer can be."""

    def evaluate(
        self, predictor: Any, source: str, *, split: str, encoding: str | None, columns: Mapping[str, Any],
        generation: Mapping[str, Any], progress: Progress,
    ) -> Evaluation:  # fmt: skip
        """Measure on the labelled rows of ``source``. ``columns`` are options of ``columns``, given or None."""

    def metrics_text(self, metrics: Mapping[str, Any]) -> str:
        """Return metrics as lines for a terminal."""

    def override(self, facts: Any, generation: Mapping[str, Any]) -> Any:
        """Return the search that options of ``generation`` ask for; None for a task that does not generate."""

    def request_parameters(self, facts: Any, generation: Any) -> dict[str, Any]:
        """Return the parameters of a request to Triton that searches so; None: as the model does."""


class Task(Training, Exporting, Serving, Measuring, Protocol):
    """A task. ``name`` is what ``--task`` takes and a manifest has, ``facts`` the class of what is kept of a model."""

    name: str
    facts: type[TaskFacts]
    verb: str
    does: str
    """What its models do, for messages: "classify" and "classifies"."""

    def read_facts(self, record: Mapping[str, Any]) -> TaskFacts:
        """Rebuild the facts from a manifest's JSON, whose lists are tuples. Raises KeyError or TypeError."""

    def describe(self, facts: Any) -> str:
        """Return a line for ``deploykit inspect``."""
