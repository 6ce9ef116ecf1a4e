"""Answers for many rows: streamed, in order, and taken up again where a killed run stopped."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deploykit import artifacts
from deploykit.data.classification import TextRow, read_texts
from deploykit.errors import ArtifactError, DataError, UsageError
from deploykit.predictor import Predictor
from deploykit.runtime.text import MAX_TEXT_CHARS

_CHUNK = 256


@dataclass(frozen=True)
class Predicted:
    """``rows`` answered and failed together; ``resumed`` of them stood there from an earlier run."""

    rows: int
    errors: int
    resumed: int


def answers(predictor: Predictor, rows: Sequence[TextRow]) -> list[dict[str, Any]]:
    """A record for each row: origin, text, label, score and scores; or origin and error.

    ``score`` is the answer's probability (multi-label: the highest of any label).
    """
    problems = [row.problem or _too_long(row.text) for row in rows]
    good = [row.text for row, problem in zip(rows, problems) if problem is None and row.text is not None]
    scores = predictor.scores(good) if good else np.empty((0, len(predictor.task.labels)), np.float32)
    answered = iter(zip(predictor.task.decide(scores) if good else [], scores))
    records: list[dict[str, Any]] = []
    for row, problem in zip(rows, problems):
        if problem is not None:
            records.append({"origin": row.origin, "error": problem})
            continue
        label, row_scores = next(answered)
        records.append(
            {
                "origin": row.origin,
                "text": row.text,
                "label": label,
                "score": round(float(row_scores.max()), 6),
                "scores": {name: round(float(s), 6) for name, s in zip(predictor.task.labels, row_scores)},
            }
        )
    return records


def predict_file(
    predictor: Predictor,
    source: str,
    out: Path,
    *,
    identity: str,
    text_columns: Sequence[str] = (),
    encoding: str | None = None,
    force: bool = False,
    progress: Callable[[int, int], None],
) -> Predicted:
    """Write an answer for each row of ``source`` to ``out``, one JSON object a line, in order.

    Until it is whole the file has a temporary name beside ``out``; a run with the same source,
    columns and model (``identity``) continues it.
    """
    if out.suffix.lower() not in (".jsonl", ".ndjson"):
        raise UsageError(f"--output {out}: answers are written as JSON lines", "give it a name that ends in .jsonl")
    if out.exists() and not force:
        raise ArtifactError(f"{out}: exists", "choose another --output, or pass --force to replace it")
    columns = _columns(source, text_columns, predictor.task.text_columns)

    def rows() -> Iterator[TextRow]:
        return read_texts(source, columns, predictor.task.text_separator, encoding=encoding)

    digest = artifacts.digest_path(Path(source)) if Path(source).exists() else source
    key = artifacts.digest_of(digest, columns, predictor.task.text_separator, encoding, identity)[:16]
    partial = out.with_name(f".{out.name}.{key}.partial")
    total = sum(1 for _ in rows())
    errors = 0
    with artifacts.explained(out), _appending(partial) as (file, resumed):
        errors = resumed.errors
        done = resumed.rows
        progress(done, total)
        for chunk in _chunks(itertools.islice(rows(), done, None)):
            records = answers(predictor, chunk)
            file.writelines(json.dumps(r, ensure_ascii=False).encode() + b"\n" for r in records)
            file.flush()
            errors += sum("error" in r for r in records)
            done += len(records)
            progress(done, total)
        os.fsync(file.fileno())
        os.replace(partial, out)
    return Predicted(done, errors, resumed.rows)


@contextlib.contextmanager
def _appending(partial: Path) -> Iterator[tuple[Any, Predicted]]:
    """Open an unfinished file after its last whole line; yields it and what it holds."""
    partial.parent.mkdir(parents=True, exist_ok=True)
    with partial.open("a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ArtifactError(f"{partial}: another deploykit is writing it now", "wait for it") from None
        file.seek(0)
        rows = errors = end = 0
        for line in file:
            if not line.endswith(b"\n"):
                break
            rows, errors, end = rows + 1, errors + (b'"error"' in line and "error" in json.loads(line)), end + len(line)
        file.truncate(end)
        file.seek(end)
        yield file, Predicted(rows, errors, rows)


def _columns(source: str, given: Sequence[str], trained: Sequence[str]) -> tuple[str, ...]:
    """The columns asked for; else those the model was trained on, if the source has them; else detected."""
    if given:
        return tuple(given)
    try:
        next(iter(read_texts(source, trained)), None)
    except DataError:
        return ()
    return tuple(trained)


def _chunks(rows: Iterable[TextRow]) -> Iterator[list[TextRow]]:
    iterator = iter(rows)
    while chunk := list(itertools.islice(iterator, _CHUNK)):
        yield chunk


def _too_long(text: str | None) -> str | None:
    if text is not None and len(text) > MAX_TEXT_CHARS:
        return f"the text has {len(text):,} characters, more than {MAX_TEXT_CHARS:,}"
    return None
