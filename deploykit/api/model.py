"""A model of any task, in this process or on a server."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from deploykit.data.reading import Reading
from deploykit.errors import DataError, UsageError
from deploykit.runtime.serving_settings import DEFAULT_URL

if TYPE_CHECKING:
    from deploykit.attribution.explain import Explanation
    from deploykit.tasks.types import Answer, Evaluation, Predictor, TaskFacts

StrPath = str | PathLike[str]


def load(
    target: StrPath,
    *,
    url: str = DEFAULT_URL,
    engine: str = "auto",
    precision: str = "auto",
    threads: int | None = None,
    draft_model: StrPath | None = None,
) -> Model:
    """Open a model: a checkpoint, an export, a packaged version, or a model on a running server.

    Args:
        target: A folder; or the name of a model on the server at ``url``.
        url: HTTP address of the server, for a served model.
        engine: Engine for an export: "auto", or a name that ``package`` accepts.
        precision: Precision for an export: "auto" (INT8 if available), "int8", "fp16", "bf16" or "fp32".
        threads: CPU threads. Default: all.
        draft_model: For the export of a language model: that of a smaller one, which guesses its tokens.

    Raises:
        ArtifactError: There is no such folder, or one of its files was changed.
        EngineError: The engine cannot load the graph here.
        ServerError: No server answers at ``url``, or it has no such model.
    """
    from deploykit.tasks.opening import open_predictor

    draft = None if draft_model is None else str(draft_model)
    return Model(
        open_predictor(str(target), url=url, engine=engine, precision=precision, threads=threads, draft_model=draft)
    )


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
        """Explain which words led to the answers to texts.

        Args:
            texts: As ``predict`` takes them.
            method: "gradients" (integrated gradients; a checkpoint that classifies or generates text), "occlusion" (the
                effect of removing each word; any model), or "auto" (gradients of a classifier's checkpoint).
            answer: Explain this answer: a label, a span of the context, a translation, a text. Default: the model's.
            unit: Give weights to words, or to whole sentences: for long texts.

        Returns:
            An explanation for each text, with the weight of each word, and a check by deletion for the first 50.

        Raises:
            UsageError: The model's task cannot be explained, or ``method`` or ``answer`` does not fit it.
            DataError: The model refuses a text.
        """
        from deploykit.stages.explain import explain_texts
        from deploykit.tasks.answering import rows_of

        if isinstance(texts, str):
            raise UsageError("texts is one string", "give a list: explain([text])")
        asked = [row.text or "" for row in rows_of(texts, self.task)]
        return explain_texts(self.predictor, asked, method=method, answer=answer, unit=unit)

    def stream(self, prompt: str | Sequence[Mapping[str, Any]], **generation: Any) -> Iterator[str]:
        """Answer one prompt as a stream of pieces; the joined pieces are the answer.

        Args:
            prompt: A text (the user's message, if the model has a chat template), or messages:
                ``[{"role": "user", "content": "..."}]``.
            **generation: Sampling options: ``max_new_tokens=40, temperature=0.7``.

        Raises:
            DataError: The prompt is too long, or its messages are malformed.
            UsageError: An option of ``generation`` is unknown, or the model is not a language model.
        """
        from deploykit.tasks.types import Streaming

        if not isinstance(self._task, Streaming):
            raise UsageError(f"a model that {self._task.does} cannot stream", "use predict")
        yield from self._task.stream(self.predictor, prompt, self._task.override(self.task, generation))

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
            DataError: The rows cannot be read, or have a label that the model does not know.
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
                f"rows: a row is not a mapping of JSON values: {error}", 'give {"text": ..., "label": ...}'
            ) from None
        yield str(path)


def _uncounted(done: int, of: int) -> None:
    """Show no progress."""
