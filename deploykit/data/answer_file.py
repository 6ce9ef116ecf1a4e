"""Write answers for the rows of a file, in order; a killed run is continued."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploykit import artifacts
from deploykit.data.answer_table import Rows, write_table
from deploykit.data.texts import TextRow
from deploykit.errors import ArtifactError
from deploykit.text import MAX_TEXT_CHARS

_CHUNK = 256


@dataclass(frozen=True)
class Answered:
    """``rows`` counts answered and failed rows; ``resumed`` of them were there from an earlier run."""

    rows: int
    errors: int
    resumed: int


@dataclass(frozen=True)
class Line:
    """A line of the output, without its end. ``failed``: it holds an error instead of an answer."""

    text: str
    failed: bool


def answer_file(
    rows: Callable[[], Iterator[TextRow]],
    answer: Callable[[Sequence[TextRow]], Iterable[Line]],
    out: Path,
    *,
    key: str,
    failed: Callable[[bytes], bool],
    force: bool,
    progress: Callable[[int, int], None],
    table: Rows | None = None,
    chunk: int = _CHUNK,
) -> Answered:
    """Write a line for each row to ``out``, in order. ``failed`` recognizes lines of an earlier run that hold an error.

    With ``table``, which gives the columns of each row, the lines are JSON objects and ``out`` becomes a table.

    Until it is whole the file has a temporary name beside ``out``; a run with the same ``key`` (all that
    determines the answers: the model's digest too) continues it. Raises ArtifactError when a run with another key has
    left such a file; ``force`` removes it.
    """
    if out.exists() and not force:
        raise ArtifactError(f"{out}: already exists", "choose another --output, or pass --force to replace it")
    partial = out.with_name(f".{out.name}.{key[:16]}.partial")
    _check_others(out, partial, force=force)
    total = sum(1 for _ in rows())
    with artifacts.explained(out), _appending(partial, failed) as (file, resumed):
        done, errors = resumed.rows, resumed.errors
        progress(done, total)
        for part in _chunks(itertools.islice(rows(), done, None), chunk):
            lines = list(answer(part))
            file.writelines(line.text.encode() + b"\n" for line in lines)
            file.flush()
            errors += sum(line.failed for line in lines)
            done += len(lines)
            progress(done, total)
        os.fsync(file.fileno())
        if table is None:
            os.replace(partial, out)
        else:
            write_table(partial, table, out)
            partial.unlink()
    return Answered(done, errors, resumed.rows)


def _check_others(out: Path, own: Path, *, force: bool) -> None:
    """Let no two runs of different models, rows or options answer for one file."""
    for other in sorted(out.parent.glob(f".{glob.escape(out.name)}.*.partial")):
        if other == own:
            continue
        with other.open("rb") as file:
            _lock(file, other)
            if not force:
                raise ArtifactError(
                    f"{out}: a run that did not end has {sum(1 for _ in file):,} rows of it, from another model, other "
                    "input or other options",
                    f"run it again as it was, pass --force to begin anew, or keep {other.name} under another name",
                )
            other.unlink()


def _lock(file: Any, path: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ArtifactError(f"{path}: another deploykit is writing it now", "wait for it") from None


@contextlib.contextmanager
def _appending(partial: Path, failed: Callable[[bytes], bool]) -> Iterator[tuple[Any, Answered]]:
    """Open an unfinished file after its last complete line. Yields the file and what it contains."""
    partial.parent.mkdir(parents=True, exist_ok=True)
    with partial.open("a+b") as file:
        _lock(file, partial)
        file.seek(0)
        rows = errors = end = 0
        for line in file:
            if not line.endswith(b"\n"):
                break
            rows, errors, end = rows + 1, errors + failed(line), end + len(line)
        file.truncate(end)
        file.seek(end)
        yield file, Answered(rows, errors, rows)


def _chunks(rows: Iterable[TextRow], size: int) -> Iterator[list[TextRow]]:
    iterator = iter(rows)
    while chunk := list(itertools.islice(iterator, size)):
        yield chunk


JSON_LINES = (".jsonl", ".ndjson")
"""Suffixes of JSON lines files."""


def json_line(record: dict[str, Any]) -> Line:
    return Line(json.dumps(record, ensure_ascii=False), "error" in record)


def is_error(line: bytes) -> bool:
    """Return whether a line of ``json_line`` holds an error."""
    return b'"error"' in line and "error" in json.loads(line)


def source_digest(source: str) -> str:
    """Return a digest that identifies the rows of a file, or a hub dataset by its name."""
    return artifacts.digest_path(Path(source)) if Path(source).exists() else source


def too_long(text: str | None, most: int = MAX_TEXT_CHARS) -> str | None:
    """Return why a text is refused for its length, or None."""
    if text is not None and len(text) > most:
        return f"the text has {len(text):,} characters, more than {most:,}"
    return None
