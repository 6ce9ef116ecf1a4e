"""Read the texts of a command, and report those that failed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from deploykit.cli_parts.command import say
from deploykit.data.reading import Reading
from deploykit.errors import DataError, UsageError

if TYPE_CHECKING:
    from deploykit.data.answer_file import Answered

_REPORTED = 10


def check_asked(
    command: str, what: str, texts: tuple[str, ...], source: str | None, output: str | None, reading: Reading
) -> None:
    """Raise UsageError unless there are texts, or --input with --output. ``what`` is a text for the remedy."""
    if bool(texts) == bool(source):
        raise UsageError("give texts, or --input with --output", f'deploykit {command} TARGET "{what}"')
    if bool(source) != bool(output):
        raise UsageError("--input and --output go together", "name both")
    if source is None:
        reading.refuse("the texts of the command line")


def failed_rows(problems: Sequence[str]) -> int:
    """Report failed rows on stderr, one line each, up to a limit. Returns the exit code."""
    for problem in problems[:_REPORTED]:
        say(problem)
    if len(problems) > _REPORTED:
        say(f"… and {len(problems) - _REPORTED:,} more rows")
    return 1 if problems else 0


def failed_texts(records: Sequence[Mapping[str, Any]], *, stop: bool, remedy: str) -> int:
    """Report the records of texts that failed, as ``failed_rows`` does. Raises DataError if all failed, or one did and ``stop`` is set."""
    from deploykit.data.answer_file import problem_of

    problems = [problem for record in records if (problem := problem_of(record))]
    if problems and (stop or len(problems) == len(records)):
        raise DataError("\n".join(problems), remedy)
    return failed_rows(problems)


def answered_record(output: str, done: Answered) -> dict[str, Any]:
    """Return the object that --json prints for a file of answers."""
    return {"output": output, "rows": done.rows, "errors": done.errors, "resumed": done.resumed}


def answered_text(output: str, done: Answered, failed: str) -> str:
    """Return the same as a line for a terminal; ``failed`` is the word for rows with an error."""
    text = f"{output}: {done.rows:,} rows"
    if done.resumed:
        text += f", {done.resumed:,} of them from the run before"
    if done.errors:
        text += f"; {done.errors:,} {failed}"
    return text
