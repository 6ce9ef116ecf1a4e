"""The interface between stages and tasks. A task is one object in its folder's ``task.py``, with the members of ``Task``.

Methods import what they need when they run, so that a serving machine does not load the training half.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol

from deploykit.tasks.types import Answer, Evaluation, Grade, GraphKind, Options, Predictor, Progress, TaskFacts

if TYPE_CHECKING:
    from deploykit.data.reading import Reading
    from deploykit.data.texts import TextRow
    from deploykit.runtime.engines.protocol import DecodeLimits
    from deploykit.runtime.find_graphs import Graphs
    from deploykit.tasks.bundle import BundledTask

__all__ = ["Answer", "Evaluation", "Grade", "GraphKind", "Predictor", "Progress", "Task", "TaskFacts"]


class Training(Protocol):
    """Members for ``finetune``, and for recognizing a checkpoint of the task."""

    auto_model: str
    """The transformers class that loads its checkpoints: "AutoModelForSequenceClassification"."""
    heads: tuple[str, ...]
    """Suffixes of the class names in a checkpoint's ``architectures``: "ForSequenceClassification"."""
    model_types: tuple[str, ...]
    shared_types: tuple[str, ...]
    """Model types of this task only (empty: every type that no other task claims), and those that it shares."""

    def options(self) -> type[Any]:
        """Return the dataclass of options (``FinetuneOptions``); its new fields become options of ``finetune``."""

    def training_stage(self, options: Any) -> Any:
        """Return an object that reads, cleans and splits rows, and trains (``deploykit.stages.finetune.Stage``)."""

    def model_card(
        self, facts: Any, origin: str, metrics: Mapping[str, Any], held_out: str, rows: int
    ) -> tuple[list[str], list[str]]:
        """Return a checkpoint's README.md: its head, and its results on the split ``held_out`` ([] if that is "")."""

    def result(self, facts: Any, metrics: Mapping[str, Any], held_out: str) -> tuple[dict[str, Any], str]:
        """Return the task's part of the report of ``finetune``: for --json, and as lines ("" if ``held_out`` is "")."""


class Exporting(Protocol):
    """Members for ``export``, ``calibrate``, ``package`` and ``bundle``."""

    def export_steps(self) -> ModuleType:
        """Return the module with ``write``, ``write_fp32``, ``calibration_texts`` and ``calibrate``."""

    def tokenizer_files(self, files: Sequence[str]) -> Iterator[str]:
        """Return the ``files`` of an export that its tokenizer is loaded from."""

    def bundle(self, facts: Any) -> BundledTask:
        """Return the task's part of a Jetson bundle. Raises UsageError if the task has none."""

    def within(self, facts: Any, limits: DecodeLimits) -> TaskFacts:
        """Return facts whose lengths fit caches of a limited size."""


class Serving(Protocol):
    """Members that open and serve a model. Only ``open_checkpoint`` may import torch or transformers."""

    triton_backend: str
    stream_backend: str
    """The classes that answer Triton's requests, as "module:class", for NAME and for NAME_stream (empty: no such model)."""
    outputs: tuple[str, ...]
    """The output tensors that a client needs, the answer's text first; ``TARGET_TOKENS`` counts what was generated."""
    settings: tuple[str, ...]
    """The serving settings of this task, among those that only some tasks have."""
    instances: int
    """Default number of processes of a served model."""

    def config_text(self, values: Mapping[str, Any], record: Mapping[str, Any], streams: str | None) -> str:
        """Return config.pbtxt from settings ``values`` and the facts' JSON ``record``; ``streams``: the streamed model."""

    def open_checkpoint(self, path: Path) -> Predictor:
        """Load a Hugging Face checkpoint in PyTorch."""

    def open_graphs(self, path: Path, facts: Any, graphs: Graphs, threads: int | None) -> Predictor:
        """Load an export or a packaged model in this process."""

    def open_served(self, name: str, url: str) -> Predictor:
        """Connect to a model on a running server."""


class Measuring(Protocol):
    """Members for ``predict``, ``evaluate``, ``bench`` and ``tune``; ``generation`` replaces search parameters."""

    headline: str
    """The metric for comparing two models: "macro_f1"."""
    columns: tuple[str, ...]
    input_columns: tuple[str, ...]
    answer_columns: tuple[str, ...]
    """Options that name columns of a file ("label_column") and others of ``evaluate``; those of texts; what all answers have."""

    def read_inputs(self, source: str, facts: Any, *, reading: Reading, columns: Options) -> Iterator[TextRow]:
        """Stream the texts to answer: a row for every row of ``source``, with its text or the problem with it."""

    def read_texts(self, source: str, facts: Any, *, reading: Reading,
                   columns: Options) -> list[tuple[str, str | None]]:  # fmt: skip
        """Read texts, and their correct answers if the source has them."""

    def tensors(self, facts: Any, text: str) -> Mapping[str, str]:
        """Return the value of each input tensor of a Triton request for ``text``. Raises DataError."""

    def as_text(self, facts: Any, first: str, second: str) -> str:
        """Write two texts that are one input as one text, for the stages. Raises UsageError if the model reads single texts."""

    def answer(self, predictor: Any, texts: Sequence[str], generation: Any = None) -> list[Answer]:
        """Answer all texts in one call."""

    def grade(self, predictor: Any, texts: Sequence[str], truth: Sequence[str], generation: Any) -> Grade:
        """Answer all texts in batches, and grade them. Raises DataError for a ``truth`` that no answer can match."""

    def evaluate(self, predictor: Any, source: str, *, split: str, reading: Reading, columns: Options,
                 generation: Options, progress: Progress) -> Evaluation:  # fmt: skip
        """Measure on the labelled rows of ``source``. ``columns`` are options of ``columns``, given or None."""

    def metrics_text(self, columns: Mapping[str, Mapping[str, Any]]) -> str:
        """Return the metrics of models as lines for a terminal, each under its name, or one model's under ""."""

    def override(self, facts: Any, generation: Mapping[str, Any]) -> Any:
        """Return the search parameters for options of ``generation``; None for a task that does not generate."""

    def request_parameters(self, facts: Any, generation: Any) -> dict[str, Any]:
        """Return the parameters of a Triton request with this search; None: the model's own."""


class Task(Training, Exporting, Serving, Measuring, Protocol):
    """A task. ``name`` is the value of ``--task`` and in manifests, ``facts`` the dataclass of a model's facts."""

    name: str
    facts: type[TaskFacts]
    verb: str
    does: str
    """Verbs for messages: "classify" (``verb``) and "classifies" (``does``)."""

    def read_facts(self, record: Mapping[str, Any]) -> TaskFacts:
        """Rebuild the facts from a manifest's JSON, whose lists are tuples. Raises KeyError or TypeError."""

    def describe(self, facts: Any) -> str:
        """Return a line for ``deploykit inspect``."""
