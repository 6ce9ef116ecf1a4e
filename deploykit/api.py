"""The Python API: the stages of the command line as functions, for any task.

Options of a command are keyword arguments of the function with the same name: ``--num-train-epochs 1`` is
``num_train_epochs=1``. Paths are strings or ``Path`` objects. Every error is a ``DeploykitError``; an option in its
message means the argument.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from deploykit.data.reading import Reading
from deploykit.errors import DataError, DeploykitError, ServerError, UsageError
from deploykit.runtime.serving_settings import DEFAULT_URL, ServingSettings

if TYPE_CHECKING:
    from deploykit.attribution.explain import Explanation
    from deploykit.stages.export import Exported
    from deploykit.stages.finetune import Finetuned
    from deploykit.tasks.types import Answer, Evaluation, Predictor, TaskFacts
    from deploykit.triton.repository import Packaged
    from deploykit.triton.server import TritonServer

log = logging.getLogger(__name__)

StrPath = str | PathLike[str]
Say = Callable[[str], None]
_Options = TypeVar("_Options")


def finetune(
    model: StrPath | None = None,
    *,
    train: StrPath | None = None,
    output_dir: StrPath,
    task: str | None = None,
    validation: StrPath | None = None,
    test: StrPath | None = None,
    force: bool = False,
    restart: bool = False,
    folds: int = 0,
    learning_curve: bool = False,
    processes: int = 1,
    progress: Say | None = None,
    **options: Any,
) -> Finetuned:
    """Fine-tune a Hugging Face checkpoint on labelled rows, and write it to ``output_dir``.

    A run with the same inputs as an earlier one is reused. A killed run is continued, unless ``restart`` is set. With
    ``search=20`` that many runs are trained with other options each, and the best one is written.

    Args:
        model: Folder of a checkpoint, or a hub id. None for ``from_config``, which trains a new model.
        train: File of rows, folder of a dataset, or a hub id. With ``qat``, by default the rows of the run ``model``.
        output_dir: Folder to write the checkpoint to.
        task: One of the names that ``deploykit finetune --help`` lists. Default: the first of them.
        validation: Rows that the best step is chosen by. Default: split off ``train``.
        test: Rows that the result is measured on. Default: split off ``train``.
        force: Replace existing content of ``output_dir``.
        restart: Start over instead of continuing a killed run.
        folds: Also cross-validate: train on all folds of the rows but one, that often. The result has ``folds``.
        learning_curve: Also train on 10 to 75 % of the rows. The result has ``learning_curve``.
        processes: Train in so many processes that share each batch.
        progress: Called with each message, a line.
        **options: All other options of ``deploykit finetune``: ``num_train_epochs=1``, ``text_column=("title",
        "body")``.

    Raises:
        UsageError: An option is unknown, out of range, or of another task.
        DataError: The rows cannot be read, or there are too few.
        ArtifactError: ``model`` is not a checkpoint, or ``output_dir`` has other content.
    """
    from deploykit.hyperparameters.options import SearchOptions
    from deploykit.stages.finetune import finetune as run
    from deploykit.stages.finetune_options import make_options
    from deploykit.stages.repeated_runs import check_repeats, repeat
    from deploykit.stages.together import check_processes, finetune_together

    names = {field.name for field in dataclasses.fields(SearchOptions)}
    searched = SearchOptions(**{name: value for name, value in options.items() if name in names})
    options = {name: value for name, value in options.items() if name not in names}
    files = {"model": model, "train": train, "validation": validation, "test": test}
    given = {name: str(path) for name, path in files.items() if path is not None}
    named = {"task": task} if task is not None else {}
    chosen = make_options({**given, **named, **{k: v for k, v in options.items() if v is not None}})
    searched.check(chosen)
    check_repeats(chosen, folds, learning_curve, searches=bool(searched.search))
    check_processes(processes, searches=bool(searched.search), repeats=bool(folds or learning_curve))
    out, say = Path(output_dir), progress or _quiet
    if processes > 1:
        return finetune_together(chosen, processes, out, force=force, restart=restart, say=say)
    if searched.search:
        from deploykit.hyperparameters.run import search

        return search(chosen, searched, out, force=force, restart=restart, say=say).best
    done = run(chosen, out, force=force, restart=restart, say=say)
    return repeat(chosen, done, out, folds=folds, curve=learning_curve, say=say)


def export(
    checkpoint: StrPath, output_dir: StrPath, *, force: bool = False, progress: Say | None = None, **options: Any
) -> Exported:
    """Export a checkpoint to ONNX, with ``int8=True`` also calibrated INT8, checked and measured.

    Args:
        checkpoint: Folder of a checkpoint, from ``finetune`` or elsewhere.
        output_dir: Folder to write the export to.
        force: Replace existing content of ``output_dir``.
        progress: Called with each message, a line.
        **options: Fields of ``ExportOptions``, the options of ``deploykit export``: ``int8=True``, ``max_drop=1.0``,
            ``calibration_data="rows.csv"``, ``trt=EngineOptions(gpu="sm_86")``.

    Raises:
        UsageError: An option is unknown or invalid.
        ExportError: A graph differs from PyTorch, or INT8 loses more than ``max_drop`` points. Nothing is written.
    """
    from deploykit.graphs.export_options import ExportOptions
    from deploykit.stages.export import export as run

    chosen = _make(ExportOptions, {k: str(v) if isinstance(v, PathLike) else v for k, v in options.items()})
    return run(Path(checkpoint), Path(output_dir), chosen, force=force, say=progress or _quiet)


def package(
    export: StrPath,
    name: str,
    model_repository: StrPath = "model_repository",
    *,
    engine: str = "auto",
    precision: str = "auto",
    overwrite_config: bool = False,
    stream: bool = True,
    require_signature: StrPath | None = None,
    **settings: Any,
) -> Packaged:
    """Add an export to a Triton model repository, as the next version of the model ``name``.

    Args:
        export: Folder of an export.
        name: Name of the model, for clients.
        model_repository: Folder of packaged models; made if missing.
        engine: "auto", "tensorrt", "native", "openvino", "onnxruntime" or "cuda".
        precision: "auto" (INT8 if there is one), "int8", "fp16", "bf16" or "fp32".
        overwrite_config: Replace an existing config.pbtxt; by default it is kept.
        stream: Also write NAME_stream, for tasks that have one.
        require_signature: Public key (PEM) that the export must be signed with.
        **settings: Fields of ``ServingSettings``: ``instances=2``, ``max_batch_size=32``.

    Raises:
        UsageError: A name or a setting is not allowed, or the settings would have no effect because config.pbtxt is
        kept. ArtifactError: The export has no such graph or is not signed, or an existing config.pbtxt does not fit it.
    """
    from deploykit.triton.repository import package as run
    from deploykit.triton.repository import refuse_ignored

    if settings and not overwrite_config:
        refuse_ignored(Path(model_repository) / name, next(iter(settings)))
    return run(
        Path(export),
        name,
        Path(model_repository),
        engine=engine,
        precision=precision,
        settings=_make(ServingSettings, settings) if settings else None,
        overwrite_config=overwrite_config,
        stream=stream,
        require_signature=None if require_signature is None else Path(require_signature),
    )


def load(
    target: StrPath,
    *,
    url: str = DEFAULT_URL,
    engine: str = "auto",
    precision: str = "auto",
    threads: int | None = None,
) -> Model:
    """Open a model: a checkpoint, an export, a packaged version, or a model on a running server.

    Args:
        target: A folder; or the name of a model on the server at ``url``.
        url: HTTP address of the server, for a served model.
        engine: Engine for an export: "auto", or a name that ``package`` accepts.
        precision: Precision for an export: "auto" (INT8 if available), "int8", "fp16", "bf16" or "fp32".
        threads: CPU threads. Default: all.

    Raises:
        ArtifactError: There is no such folder, or one of its files was changed.
        EngineError: The engine cannot load the graph here.
        ServerError: No server answers at ``url``, or it has no such model.
    """
    from deploykit.tasks.opening import open_predictor

    return Model(open_predictor(str(target), url=url, engine=engine, precision=precision, threads=threads))


class Model:
    """A model of any task, in this process or on a server. One caller at a time; use as a context manager, or
    ``close``.

    ``predict`` has a second name for each task: ``classify``, ``translate``, ``answer``, ``generate``.
    """

    def __init__(self, predictor: Predictor) -> None:
        from deploykit.tasks.registry import task_of

        self.predictor = predictor
        """The task's own predictor: a classifier's ``scores``, a translator's ``translate`` with its search."""
        self._task = task_of(predictor.task)

    @property
    def task(self) -> TaskFacts:
        """The facts of the model: labels, languages, lengths."""
        return self.predictor.task

    def predict(self, texts: Sequence[str | tuple[str, str]], **generation: Any) -> list[Answer]:
        """Answer texts, in their order.

        Args:
            texts: A list of texts; for a classifier of pairs, of ``(text, other text)``; for question answering, of
                ``(question, context)`` or JSON: ``{"question": "...", "context": "..."}``.
            **generation: Search parameters, for a model that generates: ``num_beams=4``, ``max_new_tokens=40``.

        Returns:
            An answer for each text. ``text`` is the answer as one string, ``fields`` has all of it: of a classifier
            ``label``, ``score`` and ``scores``, of a translator ``translation``, ``target_tokens`` and ``finish``,
            of question answering ``answer``, ``start``, ``end`` and ``score``.

        Raises:
            DataError: A text is too long, or refused; the message has its number, from 1. An empty text is answered.
            UsageError: An option of ``generation`` is unknown, or the model does not generate.
        """
        from deploykit.tasks.answering import answer_rows, rows_of

        if isinstance(texts, str):
            raise UsageError("texts is one string", "give a list: predict([text])")
        search = self._task.override(self.task, generation) if generation else None
        answers = []
        for row in answer_rows(self.predictor, rows_of(texts, self.task), search):
            if row.answer is None:
                raise DataError(f"{row.origin}: {row.error}", "correct that text, or leave it out")
            answers.append(row.answer)
        return answers

    def explain(
        self,
        texts: Sequence[str | tuple[str, str]],
        *,
        method: str = "auto",
        answer: str | None = None,
        unit: Literal["word", "sentence"] = "word",
    ) -> list[Explanation]:
        """Say which words the answers to texts come from.

        Args:
            texts: As ``predict`` takes them.
            method: "gradients" (integrated gradients; a checkpoint that classifies or generates text), "occlusion" (the
                effect of removing each word; any model), or "auto" (gradients of a classifier's checkpoint).
            answer: Explain this answer: a label, a span of the context, a translation, a text. Default: the model's.
            unit: Give weights to words, or to whole sentences: for long texts.

        Returns:
            An explanation for each text, with the weight of each word, and a check by deletion for the first 50.

        Raises:
            UsageError: The model's task has no explanations, or ``method`` or ``answer`` does not fit it.
            DataError: The model refuses a text.
        """
        from deploykit.stages.explain import explain_texts
        from deploykit.tasks.answering import rows_of

        if isinstance(texts, str):
            raise UsageError("texts is one string", "give a list: explain([text])")
        asked = [row.text or "" for row in rows_of(texts, self.task)]
        return explain_texts(self.predictor, asked, method=method, answer=answer, unit=unit)

    def stream(self, prompt: str | Sequence[Mapping[str, Any]], **generation: Any) -> Iterator[str]:
        """Answer one prompt piece by piece; joined, the pieces are the answer.

        Args:
            prompt: A text (the user's message, if the model has a chat template), or messages:
                ``[{"role": "user", "content": "..."}]``.
            **generation: Sampling options: ``max_new_tokens=40, temperature=0.7``.

        Raises:
            DataError: The prompt is too long, or its messages are malformed.
            UsageError: An option of ``generation`` is unknown, or the model is no language model.
        """
        stream = getattr(self.predictor, "stream", None)
        if stream is None:
            raise UsageError(f"a model that {self._task.does} gives no streams", "use predict")
        from deploykit.tasks.text_generation.generator import as_prompt

        asked = as_prompt(self.predictor, prompt)  # type: ignore[arg-type]
        yield from stream(asked, self._task.override(self.task, generation))

    def evaluate(
        self,
        rows: StrPath | Iterable[Mapping[str, Any]],
        *,
        split: str = "test",
        encoding: str | None = None,
        delimiter: str | None = None,
        quoting: str | None = None,
        no_header: bool = False,
        columns: Sequence[str] = (),
        on_error: str = "skip",
        progress: Callable[[int, int], None] | None = None,
        **options: Any,
    ) -> Evaluation:
        """Measure the model on labelled rows.

        Args:
            rows: A file, the folder of a dataset or a hub id, as ``deploykit evaluate --data`` takes it; or the rows
                themselves, each a mapping from column to value: ``[{"text": "What a film!", "label": "positive"}]``.
            split: Split of a dataset.
            encoding: Encoding of a text file. Default: UTF-8, or as the byte order mark says.
            delimiter: Character between the fields of a .csv or .tsv file. Default: detected.
            quoting: "none" or "minimal" (quotes enclose fields), in a .csv or .tsv file. Default: detected.
            no_header: The first row of a table is data.
            columns: All columns of a table without a header, in order. Default: "1", "2", …
            on_error: "skip" rows that are malformed, incomplete or refused by the model, or "stop" at the first.
            progress: Called with the number of rows done, and of all rows.
            **options: Names of columns (``label_column="stars"``), and how to search, as ``predict`` takes it.

        Returns:
            ``metrics`` by name, and the number of ``rows``; ``problems`` names each row that was skipped, and says why.

        Raises:
            DataError: The rows cannot be read, or have an answer that the model does not know.
        """
        from deploykit.training.options import fit_multiple

        reading = Reading(encoding, delimiter, quoting, no_header, tuple(columns), on_error)
        reading.check()
        named = {name: value for name, value in options.items() if name in self._task.columns}
        generation = {name: value for name, value in options.items() if name not in named}
        self._task.override(self.task, generation)  # raises UsageError for parameters that the task does not have
        named = fit_multiple(self._task.options(), named)
        with _as_file(rows) as source:
            done = self._task.evaluate(
                self.predictor, source, split=split, reading=reading, columns=named, generation=generation,
                progress=progress or _uncounted,
            )  # fmt: skip
        reading.stop_at(done.problems)
        return done

    def close(self) -> None:
        """Release connections."""
        self.predictor.close()

    def __getattr__(self, name: str) -> Callable[..., list[Answer]]:
        """Return ``predict`` under the task's verb, such as ``translate``."""
        task = self.__dict__.get("_task")
        if task is not None and name == task.verb.split()[0]:
            return self.predict
        what = f"a model that {task.does}" if task is not None else type(self).__name__
        raise AttributeError(f"{what} has no {name!r}; it has predict, evaluate and close")

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Server:
    """The embedded Triton on a model repository, for the duration of the block.

    A model whose process dies is loaded again. A port of 0 takes a free one.

    Args:
        model_repository: Folder of packaged models.
        host: Address to listen on; "0.0.0.0" accepts connections from other machines.
        http_port: Port of HTTP; ``url`` is the address.
        grpc_port: Port of gRPC.
        metrics_port: Port of the Prometheus metrics.
        ready_timeout: Seconds to wait for all models to load.
        drain: Seconds to wait for requests in flight when stopping.
        log_file: Triton's own log. Default: a temporary file.
        require_signature: Public key (PEM) that each model's folder must be signed with.

    Raises:
        ArtifactError: A model is damaged, or not signed.
        ServerError: A port is taken, a model cannot be loaded, or the server ended unexpectedly.
    """

    def __init__(
        self,
        model_repository: StrPath = "model_repository",
        *,
        host: str = "127.0.0.1",
        http_port: int = 8000,
        grpc_port: int = 8001,
        metrics_port: int = 8002,
        ready_timeout: float = 60.0,
        drain: float = 30.0,
        log_file: StrPath | None = None,
        require_signature: StrPath | None = None,
    ) -> None:
        from deploykit.triton.server import TritonServer

        self._server: TritonServer = TritonServer(
            Path(model_repository), host=host, http_port=http_port, grpc_port=grpc_port, metrics_port=metrics_port,
            ready_timeout=ready_timeout, drain=drain, log_file=None if log_file is None else Path(log_file),
            require_signature=None if require_signature is None else Path(require_signature),
        )  # fmt: skip
        self._ending = threading.Event()
        self._supervisor: threading.Thread | None = None
        self._lost: DeploykitError | None = None
        self._loaded: list[Model] = []

    @property
    def url(self) -> str:
        """HTTP address of the running server."""
        return self._server.urls.http

    @property
    def grpc_url(self) -> str:
        """gRPC address of the running server, host:port."""
        return self._server.urls.grpc

    @property
    def metrics_url(self) -> str:
        """Address of the Prometheus metrics."""
        return self._server.urls.metrics

    @property
    def models(self) -> tuple[str, ...]:
        """Names of the served models."""
        return self._server.models

    def load(self, name: str) -> Model:
        """Connect to one of the ``models``. It is closed when the block ends, at the latest."""
        model = load(name, url=self.url)
        self._loaded.append(model)
        return model

    def __enter__(self) -> Server:
        self._ending.clear()
        self._server.start()
        self._supervisor = threading.Thread(target=self._supervise, name="deploykit-supervisor", daemon=True)
        self._supervisor.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        while self._loaded:
            self._loaded.pop().close()
        self._ending.set()
        if self._supervisor is not None:
            self._supervisor.join()
        self._server.stop()
        if self._lost is not None and error is None:
            raise self._lost

    def _supervise(self) -> None:
        try:
            self._server.supervise(self._ending)
        except ServerError as error:
            log.error("%s", error)
            self._lost = error


def _make(kind: type[_Options], given: Mapping[str, Any]) -> _Options:
    """Return a dataclass of options. Raises UsageError for one that it does not have."""
    known = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    for name in given:
        if name not in known:
            raise UsageError(f"unknown option {name!r}", f"known: {', '.join(known)}")
    return kind(**given)


@contextlib.contextmanager
def _as_file(rows: StrPath | Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """Yield a file name for rows, writing a file for rows given as mappings."""
    if isinstance(rows, str | PathLike):
        yield str(rows)
        return
    with tempfile.TemporaryDirectory(prefix="deploykit-") as folder:
        path = Path(folder) / "rows.jsonl"
        try:
            path.write_text("".join(json.dumps(dict(row)) + "\n" for row in rows), encoding="utf-8")
        except (TypeError, ValueError) as error:
            raise DataError(
                f"rows: a row is no mapping of JSON values: {error}", 'give {"text": ..., "label": ...}'
            ) from None
        yield str(path)


def _quiet(message: str) -> None:
    """Print nothing."""


def _uncounted(done: int, of: int) -> None:
    """Show no progress."""
