"""Types of the arguments and results of a task's methods."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, runtime_checkable

if TYPE_CHECKING:
    from deploykit.attribution.explain import ExplainedText
    from deploykit.attribution.words import Unit
    from deploykit.bootstrap import Measure
    from deploykit.data.reading import Reading
    from deploykit.runtime.find_graphs import Graphs
    from deploykit.tasks.demo_recipe import Recipe

GraphKind = Literal["encoder", "encoder-decoder", "decoder"]
"""Graphs of an export: one encoder, an encoder with a decoder that generates token by token, or one decoder-only
graph."""

Options = Mapping[str, Any]
"""Options of a command by name; those that were not given are None."""

Progress = Callable[[int, int], None]
"""Called with the number of rows done and of all rows."""


class TaskFacts(Protocol):
    """The facts in a manifest: a frozen dataclass of JSON values and tuples, one for each task."""

    __dataclass_fields__: ClassVar[dict[str, Any]]
    name: ClassVar[str]
    graph_kind: ClassVar[GraphKind]
    max_chars: ClassVar[int]
    """Longest text (characters) that is accepted."""

    @property
    def shape_limits(self) -> Mapping[str, int]:
        """Largest size of each axis: tokens of a text (``length``), positions of a cache (``past``)."""

    @property
    def model_config(self) -> Mapping[str, Any]:
        """The fields of a Hugging Face configuration that the model's head needs."""


class Predictor(Protocol):
    """A model that answers texts, in this process or on a server."""

    @property
    def task(self) -> TaskFacts: ...

    def close(self) -> None:
        """Release connections."""


@dataclass(frozen=True)
class Command:
    """A command for models of one task.

    ``module`` has it as ``command``, a click command made by ``deploykit.cli_parts.command.deploykit_command``; it is
    imported when the command runs. ``line`` is its line in ``deploykit --help``. ``deploykit doctor`` looks for the
    ``packages`` that it imports.
    """

    module: str
    line: str
    packages: tuple[str, ...] = ("tritonclient",)


@runtime_checkable
class Commanding(Protocol):
    """A task with commands of its own, such as ``deploykit translate``. A task need not be one."""

    commands: Mapping[str, Command]
    """The commands by name. A name of deploykit's own commands is ignored."""


@runtime_checkable
class Explaining(Protocol):
    """A task whose answers ``deploykit explain`` can explain. A task need not be one."""

    def explained_text(self, predictor: Any, text: str, answer: str | None, method: str, unit: Unit) -> ExplainedText:
        """Return ``text``, in units, with the answer to explain, the model's own for None, by ``method``: "auto", "gradients"
        or "occlusion". Raises UsageError if the method or the answer does not fit, DataError if the text is refused."""


@dataclass(frozen=True)
class ReportOptions:
    """Contents of a report of ``evaluate``: ``slices`` by these columns, drift ``against`` a file of new rows, of a
    classifier flips of answers by the words of the file ``swaps`` (None: English ones), and slices by whether the model has
    ``seen`` a row's text in training (its duplicate key; None: unknown)."""

    slices: tuple[str, ...] = ()
    against: str | None = None
    swaps: Path | None = None
    seen: frozenset[str] | None = None


@runtime_checkable
class Reporting(Protocol):
    """A task that ``deploykit evaluate --report`` writes a page for. A task need not be one.

    Its report counts the answers that change with a word, by ``ReportOptions.swaps``, if ``counts_flips`` is true.
    """

    def report(self, predictor: Any, source: str, *, split: str, reading: Reading, columns: Options, generation: Options,
               options: ReportOptions, progress: Progress) -> tuple[Evaluation, dict[str, Any]]:  # fmt: skip
        """Measure as ``evaluate`` does, and return an analysis of the errors, as JSON."""

    def write_report(self, title: str, record: Mapping[str, Any], out: Path) -> None:
        """Write the page of what ``report`` returned. Raises MissingDependencyError without matplotlib."""


@dataclass(frozen=True)
class Answer:
    """An answer to one text.

    ``text`` is the whole answer as one string. ``tokens`` counts generated tokens, or is 0. ``fields`` are the columns
    of a record of ``predict``, JSON values; by default a record has one column ``answer``. A field ``score`` is the
    answer's probability. ``asked`` replaces the text in a record if the text combines several inputs: the question
    without its context.
    """

    text: str
    tokens: int = 0
    fields: Mapping[str, Any] = field(default_factory=dict)
    asked: str = ""

    @property
    def columns(self) -> Mapping[str, Any]:
        """The columns of a record."""
        return self.fields or {"answer": self.text}


@dataclass(frozen=True)
class Evaluation:
    """The metrics of ``rows`` rows.

    ``problems`` has a line for each row that was skipped, because it lacks a text or a right answer or the model refused
    it: "tweets.csv:17: the label is missing". ``notes`` tell what else was made of the rows. ``measure`` gives the
    metrics for other weights of the rows, if the task can: two models are compared by it.
    """

    metrics: dict[str, Any]
    rows: int
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    measure: Measure | None = field(default=None, repr=False, compare=False)

    @property
    def skipped(self) -> int:
        """The number of rows that were skipped."""
        return len(self.problems)


@dataclass(frozen=True)
class Grade:
    """Answers to every text and their metrics. ``labels`` are a classifier's, None for other tasks. ``measure`` gives the
    metrics for other weights of the texts, if the task can: intervals, and the differences of two models, come from it."""

    labels: tuple[str, ...] | None
    answers: tuple[str, ...]
    metrics: Mapping[str, Any]
    measure: Measure | None = field(default=None, repr=False, compare=False)


@runtime_checkable
class Streaming(Protocol):
    """A task whose models answer piece by piece. A task need not be one."""

    def stream(self, predictor: Any, prompt: str | Sequence[Mapping[str, Any]], generation: Any) -> Iterator[str]:
        """Yield the pieces of the answer to a text or to messages. Raises DataError for one that is refused."""


@runtime_checkable
class Demonstrating(Protocol):
    """A task that ``deploykit demo`` can show. A task need not be one."""

    demo: str
    """The value of --recipe."""

    def demo_recipe(self, out: Path, *, max_rows: int | None, say: Callable[[str], None]) -> Recipe:
        """Fetch data and weights into ``out``, and return the demo. ``max_rows`` of the data at most; 0: all; None: as many as
        two cores train on in a few minutes."""


@runtime_checkable
class Drafting(Protocol):
    """A task whose models can have a draft model. A task need not be one."""

    def open_drafted(self, path: Path, facts: Any, graphs: Graphs, threads: int | None, draft: Path) -> Predictor:
        """Load the export in ``path`` as ``open_graphs`` does, with the export ``draft``, which guesses for it.

        Raises UsageError if it cannot.
        """

    def draft_files(self, directory: Path, engine: str, draft: Path) -> tuple[dict[str, Path], str]:
        """Return the files of the export ``draft``, by their names in a packaged model, and its digest.

        Raises UsageError if it cannot guess for the export in ``directory``, which ``engine`` runs.
        """
