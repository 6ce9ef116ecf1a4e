from __future__ import annotations

import itertools
import json

from hypothesis import given, settings
from hypothesis import strategies as st

from deploykit.openai.structured import tool_call_schema
from deploykit.openai.tool_calls import ToolCall, ToolCallParser

ANSWERS = [
    'I look.\n<tool_call>\n{"name": "get", "arguments": {"city": "Köln <b>"}}\n</tool_call>',
    '<tool_call>{"name": "get", "arguments": {}}</tool_call>\n<tool_call>{"name": "put", "arguments": {}}</tool_call>',
    '<tool_call>{"name": "get", "arguments": {}}',  # the closing tag was a stop token
    '<tool_call>{"name": "unknown", "arguments": {}}</tool_call> after',
    "<tool_call>not JSON</tool_call>",
    '{"name": "get", "parameters": {"city": "Oslo"}}',
    '[{"name": "get", "arguments": {}}, {"name": "put", "arguments": {}}]',
    '{"name": "nobody", "arguments": {}}',
    '{"city": "Oslo"}',
    "1 < 2 and <tool_cal is not a tag  \n",
    "  \n",
    "",
    "text < tool_call>",
    '{"name": "get", "arguments": "not an object"}',
]


def parts(pieces: list[str]) -> tuple[str, list[tuple[str, str]]]:
    """Return the text and the calls that a parser finds in ``pieces``."""
    parser = ToolCallParser({"get", "put"})
    found = [part for piece in pieces for part in parser.feed(piece)] + list(parser.finish())
    text = "".join(part for part in found if isinstance(part, str))
    return text, [(part.name, part.arguments) for part in found if isinstance(part, ToolCall)]


def test_calls_of_both_forms_are_found() -> None:
    assert parts([ANSWERS[0]]) == ("I look.", [("get", '{"city": "Köln <b>"}')])
    assert parts([ANSWERS[1]]) == ("", [("get", "{}"), ("put", "{}")])
    assert parts([ANSWERS[2]]) == ("", [("get", "{}")])
    assert parts([ANSWERS[5]]) == ("", [("get", '{"city": "Oslo"}')])
    assert parts([ANSWERS[6]]) == ("", [("get", "{}"), ("put", "{}")])


def test_what_is_no_call_stays_text() -> None:
    for answer in (*ANSWERS[3:5], *ANSWERS[7:]):
        assert parts([answer]) == (answer, [])


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(ANSWERS), st.lists(st.integers(0, 120)))
def test_where_the_pieces_are_cut_does_not_matter(answer: str, cuts: list[int]) -> None:
    places = [0, *sorted(cut for cut in cuts if cut < len(answer)), len(answer)]
    assert parts([answer[a:b] for a, b in itertools.pairwise(places)]) == parts([answer])


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(["<", "<tool_call>", "</tool_call>", " ", "\n", "{", '"x"', "}", "a", "call>"])))
def test_text_without_calls_comes_back_whole(pieces: list[str]) -> None:
    assert parts(pieces) == ("".join(pieces), [])


def test_references_inside_a_tools_schema_still_hold() -> None:
    place = {"type": "object", "properties": {"at": {"$ref": "#/$defs/City"}}, "$defs": {"City": {"type": "string"}}}
    schema = tool_call_schema([("a", {}), ("get", place)])
    reference = schema["anyOf"][1]["properties"]["arguments"]["properties"]["at"]["$ref"]
    target = schema
    for part in reference.removeprefix("#/").split("/"):
        target = target[int(part)] if isinstance(target, list) else target[part]
    assert target == {"type": "string"}
    assert json.dumps(schema).count("$ref") == 1
