"""Write answers for the rows of a file, in order; a killed run is continued."""

from __future__ import annotations

import contextlib
import glob
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploykit import artifacts
from deploykit.data.reading import stopped
from deploykit.data.texts import TextRow
from deploykit.errors import ArtifactError
from deploykit.locks import lock
from deploykit.text import MAX_TEXT_CHARS, without_surrogates

_CHUNK = 256

Part = Sequence[Any]
"""Rows that are answered together."""
Records = Sequence[Mapping[str, Any]]
Function = Callable[[Any, Part], Records]
"""Answers a part with a model."""
Spread = Callable[[Function, Iterator[Part]], Iterator[Records]]
"""Applies a function to a model and each part, in their order."""


@dataclass(frozen=True)
class Answered:
    """``rows`` counts answered and failed rows; ``resumed`` of them were there from an earlier run. ``problems`` has a line
    for each row that failed: its name, and why."""

    rows: int
    resumed: int
    problems: tuple[str, ...] = ()

    @property
    def errors(self) -> int:
        """The number of rows that failed."""
        return len(self.problems)


def answer_file(
    rows: Callable[[], Iterator[TextRow]],
    answer: Callable[[Iterator[Part]], Iterator[Records]],
    out: Path,
    *,
    key: str,
    on_error: str,
    force: bool,
    progress: Callable[[int, int], None],
    finish: Callable[[Path, Path], None] | None = None,
    chunk: int = _CHUNK,
) -> Answered:
    """Write a record for each row to ``out``, in order: a JSON object a line, with "error" for a row that fails.

    ``answer`` yields the records of each part of the rows, in order; a part has at most ``chunk`` rows.

    With ``finish``, called with a file of such lines and ``out``, that writes ``out``.

    Raises DataError for the first row that fails if ``on_error`` is "stop": for one that is malformed or has no text,
    before any work.

    Until it is complete, the file has a temporary name next to ``out``; a run with the same ``key`` (all that
    determines the answers: the model's digest too) continues it. Raises ArtifactError when a run with another key has
    left such a file; ``force`` removes it.
    """
    if out.exists() and not force:
        raise ArtifactError(f"{out}: already exists", "choose another --output, or pass --force to replace it")
    partial = out.with_name(f".{out.name}.{key[:16]}.partial")
    _check_others(out, partial, force=force)
    total = _count(rows(), stop=on_error == "stop")
    with artifacts.explained(out), _appending(partial) as (file, resumed):
        done, problems = resumed.rows, list(resumed.problems)
        progress(done, total)
        for records in answer(_chunks(itertools.islice(rows(), done, None), chunk)):
            for record in records:
                if problem := problem_of(record):
                    if on_error == "stop":
                        raise stopped(problem)
                    problems.append(problem)
                file.write(without_surrogates(json.dumps(record, ensure_ascii=False)).encode() + b"\n")
                done += 1
            file.flush()
            progress(done, total)
        os.fsync(file.fileno())
        if finish is None:
            os.replace(partial, out)
        else:
            finish(partial, out)
            partial.unlink()
    return Answered(done, resumed.rows, tuple(problems))


def in_process(model: Any) -> Spread:
    """Return a function that answers each part with ``model`` in this process."""
    return lambda function, parts: (function(model, part) for part in parts)


def problem_of(record: Mapping[str, Any]) -> str:
    """Return the name of a row that failed, and why; "" for one that was answered."""
    return f"{record['origin']}: {record['error']}" if "error" in record else ""


def _count(rows: Iterable[Any], *, stop: bool) -> int:
    count = 0
    for row in rows:
        if stop and row.problem:
            raise stopped(f"{row.origin}: {row.problem}")
        count += 1
    return count


def _check_others(out: Path, own: Path, *, force: bool) -> None:
    """Refuse to continue a file that was begun with another model, other rows or other options."""
    for other in sorted(out.parent.glob(f".{glob.escape(out.name)}.*.partial")):
        if other == own:
            continue
        with other.open("rb") as file:
            _lock(file, other)
            if not force:
                raise ArtifactError(
                    f"{out}: an unfinished run has {sum(1 for _ in file):,} rows of it, from another model, other "
                    "input or other options",
                    f"run it again without changes, pass --force to start over, or keep {other.name} under another name",
                )
            other.unlink()


def _lock(file: Any, path: Path) -> None:
    if not lock(file.fileno(), wait=False):
        raise ArtifactError(f"{path}: another deploykit is writing it now", "wait for it")


@contextlib.contextmanager
def _appending(partial: Path) -> Iterator[tuple[Any, Answered]]:
    """Open an unfinished file after its last complete line. Yields the file and what it contains."""
    partial.parent.mkdir(parents=True, exist_ok=True)
    with partial.open("a+b") as file:
        _lock(file, partial)
        file.seek(0)
        end = sum(len(line) for line in file if line.endswith(b"\n"))
        file.truncate(end)
        file.seek(0)
        answered = read_answered(file)
        file.seek(end)
        yield file, answered


def read_answered(lines: Iterable[bytes]) -> Answered:
    """Return the counts of a finished file of answers; all rows count as resumed."""
    rows = 0
    problems = []
    for line in lines:
        rows += 1
        if b'"error"' in line and (problem := problem_of(json.loads(line))):
            problems.append(problem)
    return Answered(rows, rows, tuple(problems))


def _chunks(rows: Iterable[TextRow], size: int) -> Iterator[Part]:
    iterator = iter(rows)
    while chunk := list(itertools.islice(iterator, size)):
        yield chunk


JSON_LINES = (".jsonl", ".ndjson")
"""Suffixes of JSON lines files."""


def source_digest(source: str) -> str:
    """Return a digest that identifies the rows of a file, or a hub dataset by its name."""
    return artifacts.digest_path(Path(source)) if Path(source).exists() else source


def too_long(text: str | None, most: int = MAX_TEXT_CHARS) -> str | None:
    """Return why a text is refused for its length, or None."""
    if text is not None and len(text) > most:
        return f"the text has {len(text):,} characters, more than {most:,}"
    return None
