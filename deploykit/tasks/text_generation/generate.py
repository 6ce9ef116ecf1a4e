"""Answer many rows with a language model, in order; a killed run is continued."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from deploykit import artifacts
from deploykit.data.answer_file import JSON_LINES, Answered, Spread, answer_file, in_process, source_digest
from deploykit.data.read import read_records
from deploykit.data.reading import AS_FOUND, Reading
from deploykit.data.record import Record
from deploykit.data.texts import TextRow, is_text_file, listed, peek, text_lines
from deploykit.errors import DataError, UsageError
from deploykit.runtime.sampling import Sampling
from deploykit.tasks.text_generation.facts import TextGeneration
from deploykit.tasks.text_generation.generator import Generated, Prompt, TextGenerator, as_prompt
from deploykit.tasks.text_generation.messages import checked_messages, checked_tools
from deploykit.tasks.text_generation.rows import parsed_cell
from deploykit.text import without_surrogates

_CHUNK = 64
_MESSAGES = "messages"
_PROMPT_COLUMNS = (_MESSAGES, "prompt", "question", "instruction", "query", "input", "text")


@dataclasses.dataclass(frozen=True)
class PromptOptions:
    """``raw``: continue the prompt as it is, without the chat template. ``system``: text of the system message."""

    sampling: Sampling
    raw: bool = False
    system: str | None = None


@dataclasses.dataclass(frozen=True)
class Question:
    """A prompt, or the ``problem`` that makes it unusable."""

    origin: str
    prompt: Prompt = ""
    problem: str | None = None


def answers(
    generator: TextGenerator,
    questions: Sequence[Question],
    how: PromptOptions,
    progress: Callable[[int], None] = lambda done: None,
) -> list[dict[str, Any]]:
    """Return a record for each question: origin, prompt, answer (``answers`` where several are wanted), finish and the
    counts of tokens; or origin and error."""
    good = [
        question.prompt if how.raw else as_prompt(generator, question.prompt, how.system)
        for question in questions
        if question.problem is None
    ]
    found = iter(generator.reply(good, how.sampling, progress=progress))
    records: list[dict[str, Any]] = []
    for question in questions:
        answer = question.problem or next(found)
        if isinstance(answer, str | DataError):
            reason = answer if isinstance(answer, str) else answer.message
            records.append({"origin": question.origin, "error": reason})
        else:
            records.append({"origin": question.origin, "prompt": question.prompt, **_record(answer, how)})
    return records


def _record(found: Sequence[Generated], how: PromptOptions) -> dict[str, Any]:
    def one(answer: Generated) -> dict[str, Any]:
        record: dict[str, Any] = {"answer": answer.text, "finish": answer.finish, "tokens": answer.tokens}
        if how.sampling.logprobs is not None:
            record["logprobs"] = [found["logprob"] for found in answer.logprobs]
        if how.sampling.logprobs:
            record["top_logprobs"] = [found["top"] for found in answer.logprobs]
        return record

    own = one(found[0]) if how.sampling.n == 1 else {"answers": [one(answer) for answer in found]}
    return {**own, "prompt_tokens": found[0].prompt_tokens}


def read_questions(
    source: str, *, column: str | None = None, prefer: str = "", reading: Reading = AS_FOUND
) -> Iterator[Question]:
    """Stream the prompts of a .txt file (a prompt a line) or a table: a column of texts, or ``messages``.

    The column is ``column``; without it ``prefer``, if there is such a column; otherwise it is detected.
    """
    if is_text_file(source):
        for origin, line in text_lines(source, reading):
            yield _question(origin, line)
        return
    records, names = peek(read_records(source, reading), source)
    used = column or next((name for name in (prefer, *_PROMPT_COLUMNS) if name in names), None)
    if used is None or used not in names:
        what = "no column is recognized as the prompt" if column is None else f"has no column {column!r}"
        raise DataError(f"{source}: {what}; {listed(names)}", "give --prompt-column one of these")
    for record in records:
        yield _of_record(record, used)


def read_inputs(source: str, task: TextGeneration, column: str | None, reading: Reading) -> Iterator[TextRow]:
    """Stream prompts as texts. A dialog of one message of the user is its text; one of several has a problem."""
    for question in read_questions(source, column=column, prefer=prompt_column(task), reading=reading):
        if isinstance(question.prompt, str):
            text = None if question.problem else question.prompt
            yield TextRow(question.origin, text, question.problem)
        elif not isinstance(question.prompt, Mapping) and [m["role"] for m in question.prompt] == ["user"]:
            yield TextRow(question.origin, question.prompt[0]["content"], None)
        else:
            yield TextRow(question.origin, None, "the dialog has several messages, or tools: use deploykit generate")


def prompt_column(task: TextGeneration) -> str:
    """Return the column of the prompts that the model was trained on; empty if there is none."""
    return task.columns[1] if task.columns else ""


def _of_record(record: Record, column: str) -> Question:
    if record.problem:
        return Question(record.origin, problem=record.problem)
    value = record.values.get(column)
    try:
        if column == _MESSAGES:
            value = parsed_cell(value)
        if not isinstance(value, list):
            return _question(record.origin, value)
        if value and isinstance(value[-1], Mapping) and value[-1].get("role") == "assistant":
            value = value[:-1]  # a training row: its last answer is generated again
        messages = checked_messages(value)
        tools = checked_tools(parsed_cell(record.values.get("tools")))
    except ValueError as error:
        return Question(record.origin, problem=str(error))
    except DataError as error:
        return Question(record.origin, problem=error.message)
    return Question(record.origin, messages if tools is None else {_MESSAGES: messages, "tools": tools})


def _question(origin: str, value: object) -> Question:
    if value is None:
        return Question(origin, problem="the prompt is missing")
    if not isinstance(value, str):
        return Question(origin, problem="the prompt is no text")
    return Question(origin, without_surrogates(value))


def generate_file(
    generator: TextGenerator, source: str, out: Path, how: PromptOptions, *, identity: str, column: str | None = None,
    reading: Reading = AS_FOUND, force: bool = False, progress: Callable[[int, int], None], spread: Spread | None = None,
) -> Answered:  # fmt: skip
    """Write a line of JSON for each row of ``source`` to ``out``; see ``answer_file``."""
    if out.suffix.lower() not in JSON_LINES:
        raise UsageError(f"--output {out}: does not end in .jsonl", "give it such a name")

    def rows() -> Iterator[Any]:
        return read_questions(source, column=column, prefer=prompt_column(generator.task), reading=reading)

    answer = functools.partial(spread or in_process(generator), functools.partial(answers, how=how))
    key = artifacts.digest_of(source_digest(source), column, reading.key(), identity, dataclasses.asdict(how))
    return answer_file(
        rows, answer, out, key=key, on_error=reading.on_error, force=force, progress=progress, chunk=_CHUNK
    )
