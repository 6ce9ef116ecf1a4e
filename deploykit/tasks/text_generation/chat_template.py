"""Render dialogs with a checkpoint's chat template, without transformers.

A template may come from anyone, so it runs in jinja2's immutable sandbox. The environment is that of Hugging Face's
``apply_chat_template`` (documentation, "Chat templates"): the same white space rules, filters and functions.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from deploykit.errors import DataError, UsageError

Message = Mapping[str, Any]

FILE = "chat_template.jinja"
"""File name of the chat template in a checkpoint and in an export, as Hugging Face names it."""

CHATML = (
    "{%- for message in messages -%}\n"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] | trim + '<|im_end|>\\n' -}}\n"
    "{%- endfor -%}\n"
    "{%- if add_generation_prompt -%}\n"
    "{{- '<|im_start|>assistant\\n' -}}\n"
    "{%- endif -%}\n"
)
ALPACA = (
    "{{- bos_token | default('') -}}\n"
    "{%- for message in messages -%}\n"
    "{%- if message['role'] == 'system' -%}\n"
    "{{- message['content'] | trim + '\\n\\n' -}}\n"
    "{%- elif message['role'] == 'user' -%}\n"
    "{{- '### Instruction:\\n' + message['content'] | trim + '\\n\\n' -}}\n"
    "{%- elif message['role'] == 'assistant' -%}\n"
    "{{- '### Response:\\n' + message['content'] | trim + eos_token -}}\n"
    "{{- '' if loop.last else '\\n\\n' -}}\n"
    "{%- else -%}\n"
    "{{- raise_exception('the alpaca template has no role ' + message['role']) -}}\n"
    "{%- endif -%}\n"
    "{%- endfor -%}\n"
    "{%- if add_generation_prompt -%}\n"
    "{{- '### Response:\\n' -}}\n"
    "{%- endif -%}\n"
)
BUILT_IN: Mapping[str, str] = {"chatml": CHATML, "alpaca": ALPACA}
_REASONING = ("reasoning_content", "thinking", "reasoning")
CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")


class ChatTemplate:
    """One template with the special tokens that it may name. Raises UsageError for a template that is not Jinja."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        self.source = source
        self._special_tokens = dict(special_tokens)
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise UsageError(
                f"the chat template is not valid Jinja: line {error.lineno}: {error.message}", "correct the template"
            ) from error

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """Return the text of a dialog.

        Raises DataError if the template refuses it, for example for roles in a wrong order, or would leave out tools or
        their calls.
        """
        if tools and "tools" not in self.source:
            raise DataError("tools are given, but the model's chat template does not write them", "leave them out")
        if "tool_calls" not in self.source and any(message.get("tool_calls") for message in messages):
            raise DataError(
                "a message has tool_calls, but the model's chat template does not write them", "leave them out"
            )
        try:
            return self._template.render(
                messages=[_with_reasoning(message) for message in messages],
                tools=[dict(tool) for tool in tools] if tools else None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._special_tokens,
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError, IndexError) as error:
            raise DataError(
                f"the chat template refuses these messages: {error}", "correct the messages, or use another template"
            ) from error


def _with_reasoning(message: Message) -> dict[str, Any]:
    """Return a copy of ``message`` whose reasoning has every name that templates read, as in ``apply_chat_template``."""
    reasoning = next((message[name] for name in _REASONING if message.get(name) is not None), None)
    if reasoning is None:
        return dict(message)
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}


def read_template(name: str) -> str:
    """Return the template that ``--chat-template`` names: a built-in one, or a file."""
    if name in BUILT_IN:
        return BUILT_IN[name]
    try:
        return Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"--chat-template {name}: neither {' nor '.join(BUILT_IN)}, nor a readable file: {error}",
            "give one of these names, or a Jinja file",
        ) from error


class _Generation(Extension):
    """``{% generation %}`` marks what the assistant writes: here it is the text itself."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


@cache
def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja2's own filter escapes HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)
