"""Read dialogs and texts to train on, from each usual file format."""

from __future__ import annotations

import ast
import contextlib
import itertools
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from deploykit.data.read import read_records
from deploykit.data.reading import AS_FOUND, Reading
from deploykit.data.record import Record
from deploykit.data.texts import date_kind, is_text_file, listed, peek, scalar, text_lines
from deploykit.errors import DataError, UsageError
from deploykit.text import MAX_TEXT_CHARS, without_surrogates

Format = Literal["messages", "conversations", "alpaca", "prompt+completion", "columns", "text"]

_ROLES: Mapping[str, str] = {"human": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant",
                             "chatgpt": "assistant", "function": "tool", "observation": "tool"}  # fmt: skip
"""ShareGPT's names of roles -> those of chat templates."""
_KINDS: Mapping[str, str] = {
    "list": "a list, not a text", "dict": "an object, not a text",
}  # fmt: skip
"""Type of a cell that is not a text -> what is wrong with it."""
_PAIRS: Sequence[tuple[str, str]] = (
    ("prompt", "completion"), ("prompt", "response"), ("prompt", "answer"), ("question", "answer"),
    ("instruction", "response"), ("input", "output"), ("query", "response"),
)  # fmt: skip
"""Columns that are a prompt and its answer."""


@dataclass(frozen=True)
class Row:
    """A dialog (``messages``, the last of them the assistant's), or a plain ``text``.

    A message has ``role`` and ``content``, and whatever else a chat template reads. ``tools`` are JSON schemas.
    """

    messages: tuple[Mapping[str, Any], ...] = ()
    text: str | None = None
    tools: tuple[Mapping[str, Any], ...] | None = None
    origin: str = ""

    def __post_init__(self) -> None:
        # JSON's lists, where a row comes from a file.
        object.__setattr__(self, "messages", tuple(self.messages))
        object.__setattr__(self, "tools", None if self.tools is None else tuple(self.tools))

    @property
    def prompt(self) -> str:
        """The prompt as one text: near-duplicate rows are those whose prompts are alike."""
        if self.text is not None:
            return self.text
        return "\n".join(content_text(m) for m in self.messages if m["role"] not in ("assistant", "system"))

    @property
    def answer(self) -> str:
        """The content of the last message; empty for a plain text."""
        return content_text(self.messages[-1]) if self.messages else ""


@dataclass(frozen=True)
class RawRow:
    """A row as read; ``problem`` says why it is unusable."""

    row: Row
    problem: str | None = None


@dataclass(frozen=True)
class Columns:
    """How a file is read: its format, and for pairs the columns of prompt, answer and system message."""

    format: Format
    prompt: str = ""
    completion: str = ""

    def told(self) -> str:
        """Return it for people."""
        if self.format == "columns":
            return f"prompts in {self.prompt!r}, answers in {self.completion!r}"
        return {
            "messages": "dialogs in 'messages'",
            "conversations": "ShareGPT dialogs in 'conversations'",
            "alpaca": "Alpaca rows: 'instruction', 'input', 'output'",
            "prompt+completion": "prompts in 'prompt', answers in 'completion'",
            "text": f"plain texts in {self.prompt!r}",
        }[self.format]


def load_rows(
    source: str, *, prompt_column: str | None = None, completion_column: str | None = None, prefer: Columns | None = None,
    reading: Reading = AS_FOUND, split: str = "train",
) -> tuple[list[RawRow], Columns]:  # fmt: skip
    """Read every row of ``source``, in the format that its columns show.

    Formats: ``messages`` (roles system, user, assistant, tool; ``tools``), ShareGPT's ``conversations``, Alpaca's
    ``instruction``, ``input``, ``output`` (``system``, ``history``), ``prompt`` and ``completion``, two named columns,
    or ``text``. A .txt file has a ``text`` for each of its paragraphs or lines. Raises DataError when no format is
    recognized or a named column is missing.
    """
    found = _documents(source, reading) if is_text_file(source) else read_records(source, reading, split=split)
    records, names = peek(found, source)
    columns = _columns(source, names, prompt_column, completion_column, prefer)
    return [_read(record, columns) for record in records], columns


def _documents(source: str, reading: Reading) -> Iterator[Record]:
    """Yield the documents of a .txt file: its paragraphs if blank lines separate them, else its lines."""
    lines = itertools.groupby(text_lines(source, reading), key=lambda line: bool(line[1].strip()))
    blocks = [list(block) for text, block in lines if text]
    for block in [[line] for line in blocks[0]] if len(blocks) == 1 else blocks:
        yield Record(block[0][0], {"text": "\n".join(line for _, line in block)})


def _columns(
    source: str, names: Sequence[str], prompt: str | None, completion: str | None, prefer: Columns | None
) -> Columns:
    if (prompt is None) != (completion is None):
        missing = "--completion-column" if completion is None else "--prompt-column"
        raise UsageError(f"{missing} is missing", "give both --prompt-column and --completion-column")
    if prompt is not None and completion is not None:
        for option, name in (("--prompt-column", prompt), ("--completion-column", completion)):
            if name not in names:
                raise DataError(f"{source}: has no column {name!r}; {listed(names)}", f"give {option} one of these")
        if prompt == completion:
            raise UsageError(f"--prompt-column and --completion-column are both {prompt!r}", "give two columns")
        return Columns("columns", prompt, completion)
    if "messages" in names:  # deploykit's own splits, where plain texts are rows with an empty list
        return Columns("messages")
    if (
        prefer is not None
        and prefer.format in ("columns", "text")
        and {prefer.prompt, prefer.completion} - {""} <= {*names}
    ):
        return prefer
    if "conversations" in names:
        return Columns("conversations")
    if {"instruction", "output"} <= {*names}:
        return Columns("alpaca", "instruction", "output")
    for first, second in _PAIRS:
        if {first, second} <= {*names}:
            kind: Format = "prompt+completion" if (first, second) == _PAIRS[0] else "columns"
            return Columns(kind, first, second)
    if "text" in names:
        return Columns("text", "text")
    raise DataError(
        f"{source}: the format is not recognized: {listed(names)}",
        "name the columns messages, conversations, instruction and output, prompt and completion, or text; or give "
        "--prompt-column and --completion-column",
    )


def _read(record: Record, columns: Columns) -> RawRow:
    values, origin = record.values, record.origin
    if record.problem:
        return RawRow(Row(origin=origin), record.problem)
    try:
        if columns.format == "text":
            return RawRow(Row(text=_cell(values, columns.prompt), origin=origin))
        if columns.format in ("messages", "conversations"):
            if values.get("text") is not None and not values.get("messages"):
                return RawRow(Row(text=_cell(values, "text"), origin=origin))
            if values.get("functions") is not None:
                raise ValueError("its functions are an old form of OpenAI's: write them as tools")
            messages = _messages(parsed_cell(values.get(columns.format)))
            if columns.format == "conversations" and isinstance(values.get("system"), str):
                messages = [_message("system", str(values["system"])), *messages]
            tools = parsed_cell(values.get("tools")) or None
            if tools is not None and not (isinstance(tools, list) and all(isinstance(t, dict) for t in tools)):
                return RawRow(Row(origin=origin), "its tools are no list of JSON objects")
            return RawRow(Row(tuple(messages), tools=None if tools is None else tuple(tools), origin=origin))
        return RawRow(Row(tuple(_pair(values, columns)), origin=origin))
    except ValueError as error:
        return RawRow(Row(origin=origin), str(error))


def _pair(values: Mapping[str, object], columns: Columns) -> list[dict[str, Any]]:
    prompt, answer = values.get(columns.prompt), values.get(columns.completion)
    if _is_dialog(prompt) and _is_dialog(answer):  # trl's conversational prompt-completion
        return [*_messages(prompt), *_messages(answer)]
    messages = []
    question = _cell(values, columns.prompt)
    if columns.format == "alpaca":
        if (given := _cell(values, "input")).strip():
            question = f"{question}\n\n{given}"
        for turn in parsed_cell(values.get("history")) or ():
            if not (isinstance(turn, list) and len(turn) == 2):
                raise ValueError("its history is not a list of pairs")
            messages += [_message("user", _text(turn[0], "history")), _message("assistant", _text(turn[1], "history"))]
    system = _cell(values, "system") if columns.format in ("alpaca", "prompt+completion") else ""
    head = [_message("system", system)] if system.strip() else []
    return [*head, *messages, _message("user", question), _message("assistant", _cell(values, columns.completion))]


def _is_dialog(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(message, Mapping) for message in value)


def _messages(value: object) -> list[dict[str, Any]]:
    """Return messages in OpenAI's or ShareGPT's words."""
    if not isinstance(value, list) or not _is_dialog(value):
        raise ValueError("its messages are not a list of objects")
    found = []
    for message in value:
        role = message.get("role", message.get("from"))
        content = message.get("content", message.get("value"))
        if not isinstance(role, str):
            raise ValueError("a message has no role")
        rest = {k: v for k, v in message.items() if k not in ("role", "from", "content", "value") and v is not None}
        if "function_call" in rest:
            raise ValueError("a message has a function_call, an old form of OpenAI's: write it as tool_calls")
        if rest.get("weight", 1) not in (0, 1):
            raise ValueError(
                f"a message has the weight {rest['weight']!r}: write 1, or 0 for an answer not to be learned"
            )
        if "tool_calls" in rest:
            rest["tool_calls"] = _tool_calls(rest["tool_calls"])
        role = role.strip().lower()
        found.append({**_message(_ROLES.get(role, role), _content(content, rest)), **rest})
    return found


def _tool_calls(calls: object) -> list[dict[str, Any]]:
    """Return calls with their arguments as objects, as chat templates read them and serving writes them: OpenAI's are JSON in a text."""
    if not isinstance(calls, list) or not all(isinstance(call, Mapping) for call in calls):
        raise ValueError("the tool_calls of a message are not a list of objects")
    found = []
    for call in calls:
        function = call.get("function")
        if isinstance(function, Mapping) and isinstance(function.get("arguments"), str):
            call = {**call, "function": {**function, "arguments": _arguments(function["arguments"])}}
        found.append(dict(call))
    return found


def _arguments(text: str) -> dict[str, Any]:
    try:
        parsed = json.loads(text or "{}")
    except ValueError:
        parsed = None
    if not isinstance(parsed, dict):
        raise ValueError(f"the arguments of a tool call are {text[:40]!r}: write a JSON object")
    return parsed


def _content(content: object, rest: Mapping[str, Any]) -> str:
    """Return a message's content as a text: its parts joined; empty if the message has only tool calls."""
    if isinstance(content, list):
        texts = [part.get("text") if isinstance(part, Mapping) else None for part in content]
        if not all(isinstance(text, str) for text in texts):
            raise ValueError("a message has a part that is not a text")
        return "".join(map(str, texts))
    if content is None and rest.get("tool_calls"):
        return ""
    if not isinstance(content, str):
        raise ValueError("a message has no text")
    return content


def _message(role: str, content: str) -> dict[str, Any]:
    if len(content) > MAX_TEXT_CHARS:
        raise ValueError(f"a message has more than {MAX_TEXT_CHARS:,} characters")
    return {"role": role, "content": without_surrogates(content)}


def parsed_cell(value: object) -> Any:
    """Parse a cell of a CSV, which may hold JSON, or lists as pandas writes them, in Python's words."""
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    for parse in (json.loads, ast.literal_eval):
        with contextlib.suppress(ValueError, SyntaxError, MemoryError, RecursionError):
            return parse(value)
    raise ValueError("a cell that should hold JSON does not")


def _cell(values: Mapping[str, object], name: str) -> str:
    return _text(values.get(name), name)


def _text(value: object, name: str) -> str:
    """Return a cell of the column ``name`` as a text; numbers are written as other tasks read them."""
    if value is None or (isinstance(value, float) and math.isnan(value)):  # an empty cell, in pandas' words
        return ""
    if (text := scalar(value)) is None:
        if date := date_kind(value):
            raise ValueError(f"{name!r} holds {date}: format the column as text")
        kind = _KINDS.get(type(value).__name__, f"{type(value).__name__}, not a text")
        raise ValueError(f"{name!r} holds {kind}")
    if len(text) > MAX_TEXT_CHARS:
        raise ValueError(f"{name!r} has more than {MAX_TEXT_CHARS:,} characters")
    return without_surrogates(text)


def content_text(message: Mapping[str, Any]) -> str:
    """Return a message's content as one text; parts that are no text are left out."""
    content = message.get("content")
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return "".join(str(part.get("text", "")) for part in content if isinstance(part, Mapping))
    return ""


def role_problem(messages: Iterable[Mapping[str, Any]]) -> str | None:
    """Return why the roles are in no order that can be trained on, or None.

    A system message comes first, if any; user and assistant take turns, with tools' results after the assistant's calls;
    the last message is the assistant's.
    """
    before = ""
    for message in messages:
        role = message["role"]
        if role not in ("system", "developer", "user", "assistant", "tool"):
            return f"unknown role {role!r}"
        allowed = {
            "system": before == "",
            "developer": before in ("", "system"),
            "user": before != "user" and before != "tool",
            "assistant": before in ("user", "tool"),
            "tool": before in ("assistant", "tool"),
        }[role]
        if not allowed:
            return f"{role} after {before or 'nothing'}"
        before = role
    return None if before == "assistant" else "the last message is not the assistant's"
