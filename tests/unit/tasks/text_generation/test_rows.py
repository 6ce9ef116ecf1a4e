"""Rows of language models: formats, cleaning, splits, chat templates, supervised tokens."""

from __future__ import annotations

import csv
import datetime
import json
from pathlib import Path
from typing import Any

import numpy as np
import openpyxl
import pytest
from language_models import command_rows, tokenizer

from deploykit.errors import DataError, UsageError
from deploykit.tasks.text_generation.chat_template import ALPACA, CHATML, ChatTemplate
from deploykit.tasks.text_generation.checkpoint import chat_tokenizer, checkpoint_facts, set_template
from deploykit.tasks.text_generation.clean_rows import clean_rows, drop_leaks, split_rows
from deploykit.tasks.text_generation.encode import ChatTokenizer, EncodedRow, fit
from deploykit.tasks.text_generation.rows import Columns, Row, load_rows, role_problem

LLAMA3 = (
    "{% for message in messages %}{% set content = '<|im_start|>' + message['role'] + '\\n\\n' + message['content'] | trim"
    " + '<|im_end|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n\\n' }}{% endif %}"
)
"""Written after Llama-3's rules: a BOS token before all, two line ends after each role."""
BRACKETS = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must take turns') }}{% endif %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}"
    "{% endfor %}"
)
"""After Mistral's: no generation prompt, and roles that must take turns."""
THINKS = (
    "{%- for message in messages %}{% generation %}{{ '<|im_start|>' + message.role + '\\n' }}{% endgeneration %}"
    "{%- if message.role == 'assistant' and loop.last and message.reasoning_content %}{{ '<think>' + "
    "message.reasoning_content + '</think>' }}{% endif %}{{- message.content + '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if tools %}{{ tools | tojson }}{% endif %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""After Qwen3's: only the last answer keeps its reasoning."""
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{% for message in messages %}{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<|im_start|>' + role + '\\n' + message['content'] | trim + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>model\\n' }}{% endif %}"
)
"""After Gemma's: BOS, the assistant is called model, and a system message is refused."""
PHI3 = (
    "{% for message in messages %}{{ '<|' + message.role + '|>\\n' + message.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"
)
"""After Phi-3's: a dialog that is over ends with one more token."""
SMOLLM = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}{{ '<|im_start|>system\\nYou are "
    "helpful<|im_end|>\\n' }}{% endif %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""After SmolLM's: a system message of its own, where there is none."""
QWEN2 = (
    "{%- if tools %}{{- '<|im_start|>system\\n# Tools\\n' }}{%- for tool in tools %}{{- tool | tojson + '\\n' }}{%- endfor %}"
    "{{- '<|im_end|>\\n' }}{%- endif %}{%- for message in messages %}{%- if message.role == 'tool' %}"
    "{{- '<|im_start|>user\\n<tool_response>' + message.content + '</tool_response>' }}{%- else %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content }}{%- for call in message.tool_calls or [] %}"
    "{%- set call = call.function if call.function is defined else call %}"
    "{{- '<tool_call>' + call.name + ' ' + (call.arguments | tojson) + '</tool_call>' }}{%- endfor %}{%- endif %}"
    "{{- '<|im_end|>\\n' }}{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
"""After Qwen2.5's: tools in the system message, calls and their results."""
CALL = {"type": "function", "function": {"name": "ls", "arguments": {"path": "ü <b>"}}}
DIALOG = (
    {"role": "user", "content": "list the file here"},
    {"role": "assistant", "content": "ls -f ."},
    {"role": "user", "content": "copy the log above"},
    {"role": "assistant", "content": "cp -l .."},
)


def chat(template: str) -> ChatTokenizer:
    return chat_tokenizer(tokenizer(template), [2])


def supervised_text(chat: ChatTokenizer, row: Row, loss_on: Any = "completion") -> str:
    encoded = chat.encode_row(row, loss_on)
    return str(chat.tokenizer.decode(encoded.ids[encoded.supervised].tolist(), skip_special_tokens=False))


def write(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("template", [CHATML, ALPACA, LLAMA3, BRACKETS, THINKS, GEMMA, PHI3, SMOLLM, QWEN2])
@pytest.mark.parametrize("prompt_only", [False, True])
def test_ids_are_those_of_apply_chat_template(template: str, prompt_only: bool) -> None:
    ours, theirs = chat(template), tokenizer(template)
    tools = [{"type": "function", "function": {"name": "naïve <b>"}}] if template in (THINKS, QWEN2) else None
    messages = [dict(m) for m in (DIALOG[:3] if prompt_only else DIALOG)]
    if not prompt_only and template == THINKS:
        messages[-1]["thinking"] = "hm"
    expected = theirs.apply_chat_template(
        messages, tools=tools, add_generation_prompt=prompt_only, tokenize=True, return_dict=False
    )
    if prompt_only:
        found = ours.encode_prompt(messages, tools)
    else:
        found = ours.encode_row(Row(tuple(messages), tools=None if tools is None else tuple(tools))).ids.tolist()
    assert found == expected
    assert found.count(1) <= 1, "no second BOS"


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (CHATML, "ls -f .<|im_end|>cp -l ..<|im_end|>"),
        (ALPACA, "ls -f .</s>cp -l ..</s>"),
        (LLAMA3, "ls -f .<|im_end|>cp -l ..<|im_end|>"),
        (BRACKETS, " ls -f .</s> cp -l ..</s>"),
        (GEMMA, "ls -f .<|im_end|>cp -l ..<|im_end|>"),
        (PHI3, "ls -f .<|im_end|>cp -l ..<|im_end|>"),
        (SMOLLM, "ls -f .<|im_end|>cp -l ..<|im_end|>"),
        (QWEN2, "ls -f .<|im_end|>cp -l ..<|im_end|>"),
    ],
)
def test_answers_and_the_tokens_that_end_them_are_supervised(template: str, expected: str) -> None:
    assert supervised_text(chat(template), Row(DIALOG)) == expected
    last = supervised_text(chat(template), Row(DIALOG), "last-turn")
    assert last == expected[expected.index("cp") - (template == BRACKETS) :]


def test_calls_of_tools_are_supervised_and_their_results_are_not() -> None:
    messages = (
        {"role": "user", "content": "list"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "a b"},
        {"role": "assistant", "content": "two"},
    )
    own, tools = chat(QWEN2), (CALL,)
    assert supervised_text(own, Row(messages, tools=tools)) == (
        '<tool_call>ls {"path": "ü <b>"}</tool_call><|im_end|>two<|im_end|>'
    )
    expected = tokenizer(QWEN2).apply_chat_template(
        [dict(m) for m in messages], tools=[CALL], tokenize=True, return_dict=False
    )
    assert own.encode_row(Row(messages, tools=tools)).ids.tolist() == expected


@pytest.mark.parametrize("what", ["tools", "tool_calls"])
def test_what_the_template_would_leave_out_is_refused(what: str) -> None:
    messages: list[dict[str, Any]] = [{"role": "user", "content": "list"}, {"role": "assistant", "content": "a"}]
    tools = [CALL] if what == "tools" else None
    if what == "tool_calls":
        messages[1][what] = [CALL]
    with pytest.raises(DataError, match=rf"{what}.*, but the model's chat template does not write them"):
        chat(CHATML).encode_prompt(messages, tools)
    with pytest.raises(DataError, match=what):
        chat(CHATML).encode_row(Row(tuple(messages), tools=None if tools is None else tuple(tools)))


def test_an_answer_that_the_template_rewrites_later_is_not_supervised() -> None:
    messages = tuple({**m, "reasoning": "hm"} if m["role"] == "assistant" else m for m in DIALOG)
    encoded = chat(THINKS).encode_row(Row(messages))
    assert encoded.rewritten == 1
    assert supervised_text(chat(THINKS), Row(messages)) == "<think>hm</think>cp -l ..<|im_end|>"


def test_an_answer_whose_first_token_begins_in_the_prompt_is_told_of() -> None:
    ends_in = "{% for m in messages %}[{{ m.role }}]X{{ m.content }}{% endfor %}{% if add_generation_prompt %}[assistant]X{% endif %}"
    row = Row(({"role": "user", "content": "list"}, {"role": "assistant", "content": "cat f"}))
    space, line = (chat(ends_in.replace("X", end)) for end in (" ", "\n"))
    assert space.encode_row(row).joined
    assert not line.encode_row(row).joined
    assert supervised_text(line, row).startswith("cat f")


def test_a_lone_surrogate_is_read_as_the_replacement_character(tmp_path: Path) -> None:
    [raw], _ = load_rows(write(tmp_path / "rows.jsonl", {"prompt": "a\ud800b", "completion": "ok"}))
    messages = raw.row.messages
    assert raw.row.prompt == "a\ufffdb"
    assert supervised_text(chat(CHATML), Row(messages)) == "ok<|im_end|>"
    assert chat(CHATML).encode_prompt("a\ud800b") == chat(CHATML).encode_prompt("a\ufffdb")


def test_with_loss_on_all_every_token_is_supervised() -> None:
    assert chat(CHATML).encode_row(Row(DIALOG), "all").supervised.all()


def test_a_plain_text_ends_with_the_end_token() -> None:
    encoded = chat(CHATML).encode_row(Row(text="list the file"))
    assert encoded.ids[-1] == 2
    assert encoded.supervised.all()


def test_a_template_runs_in_a_sandbox() -> None:
    for source in (
        "{{ messages.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__subclasses__() }}",
    ):
        with pytest.raises(DataError, match="refuses these messages"):
            ChatTemplate(source, {}).render(DIALOG)
    with pytest.raises(UsageError, match="line 1"):
        ChatTemplate("{% for %}", {})


def test_a_template_whose_answers_have_no_end_is_refused() -> None:
    endless = "{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}"
    with pytest.raises(UsageError, match="learn to stop"):
        set_template(tokenizer(), endless, [2], needed=True)
    with pytest.raises(UsageError, match="no chat template"):
        set_template(tokenizer(), None, [2], needed=True)


def test_the_token_that_ends_a_turn_ends_an_answer_even_if_it_is_the_pad_token() -> None:
    from transformers import GenerationConfig, LlamaConfig

    own = tokenizer(CHATML)
    own.pad_token = "<|im_end|>"
    facts = checkpoint_facts(LlamaConfig(vocab_size=400, eos_token_id=2), GenerationConfig(), own)
    assert facts.eos_token_ids == (2, 4)
    encoded = chat_tokenizer(own, facts.eos_token_ids).encode_row(Row(DIALOG[:2]))
    assert encoded.ids[encoded.supervised][-1] == 4 == facts.pad_token_id


@pytest.mark.parametrize(
    ("row", "format", "roles"),
    [
        ({"messages": list(DIALOG)}, "messages", "user assistant user assistant"),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "system": "s"},
         "conversations", "system user assistant"),
        ({"instruction": "a", "input": "i", "output": "b", "system": "s", "history": [["x", "y"]]}, "alpaca",
         "system user assistant user assistant"),
        ({"prompt": "a", "completion": "b"}, "prompt+completion", "user assistant"),
        ({"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]},
         "prompt+completion", "user assistant"),
        ({"question": "a", "answer": "b", "id": 3}, "columns", "user assistant"),
        ({"text": "a b"}, "text", ""),
    ],
)  # fmt: skip
def test_the_columns_show_the_format(row: dict[str, Any], format: str, roles: str, tmp_path: Path) -> None:
    [raw], columns = load_rows(write(tmp_path / "rows.jsonl", row))
    assert raw.problem is None
    assert columns.format == format
    assert " ".join(m["role"] for m in raw.row.messages) == roles
    assert role_problem(raw.row.messages) is None or raw.row.text == "a b"


@pytest.mark.parametrize(
    ("content", "documents"),
    [
        ("one\ntwo\n\n \nthree\r\nfour\n", {"a.txt:1": "one\ntwo", "a.txt:5": "three\nfour"}),
        ("\none\ntwo", {"a.txt:2": "one", "a.txt:3": "two"}),
    ],
)
def test_a_text_file_has_paragraphs_or_lines(content: str, documents: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(content.encode())
    raw, columns = load_rows(str(tmp_path / "a.txt"))
    assert columns == Columns("text", "text")
    assert {row.row.origin: row.row.text for row in raw} == documents
    (tmp_path / "a.txt").write_text("\n \n")
    with pytest.raises(DataError, match="has no rows"):
        load_rows(str(tmp_path / "a.txt"))


def test_named_columns_and_an_unknown_format(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", {"ask": "a", "say": "b"})
    with pytest.raises(DataError, match="the format is not recognized: its columns are 'ask', 'say'"):
        load_rows(path)
    with pytest.raises(UsageError, match="--completion-column is missing"):
        load_rows(path, prompt_column="ask")
    with pytest.raises(DataError, match="no column 'tell'"):
        load_rows(path, prompt_column="ask", completion_column="tell")
    [raw], _ = load_rows(path, prompt_column="ask", completion_column="say")
    assert raw.row.answer == "b"


def test_rows_are_dropped_and_counted_by_reason(tmp_path: Path) -> None:
    good = {"messages": list(DIALOG)}
    path = write(
        tmp_path / "rows.jsonl",
        good,
        {"messages": [{**DIALOG[0], "content": "LIST  the file here"}, *DIALOG[1:]]},
        {"messages": [*DIALOG[:3], {"role": "assistant", "content": "other"}]},
        {"messages": [DIALOG[1], DIALOG[0]]},
        {"messages": [{"role": "user", "content": " "}, DIALOG[1]]},
        {"messages": [{"role": "user", "content": "long " * 50}, DIALOG[1]]},
        {"messages": "no json"},
        {"messages": [*DIALOG[:2], *DIALOG[:1], *DIALOG[:1], *DIALOG[1:2]]},
    )
    raw, _ = load_rows(path)
    kept, report = clean_rows(raw, chat(CHATML), max_length=100, on_long="drop", loss_on="completion")
    assert [row.origin for row in kept] == ["rows.jsonl:1"]
    counts = {name: n for name, n in report.to_json().items() if n and "tokens" not in name}
    assert counts == {
        "read": 8, "kept": 1, "duplicate": 1, "contradictory": 1, "refused_by_template": 2, "empty": 1, "too_long": 1,
        "unreadable": 1,
    }  # fmt: skip
    assert report.supervised_tokens == chat(CHATML).encode_row(Row(DIALOG)).supervised.sum()
    with pytest.raises(DataError, match=r"rows.jsonl:6: the row has .* tokens, more than --max-length 100"):
        clean_rows(raw, chat(CHATML), max_length=100, on_long="error", loss_on="completion")


def test_odd_messages_are_joined_or_dropped_and_the_first_is_named(tmp_path: Path) -> None:
    question, answer = DIALOG[:2]
    call = {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"type": "function", "function": {"name": "ls", "arguments": {}}}],
    }
    texts = [{"type": "text", "text": "list the "}, {"type": "text", "text": "file here"}]
    path = write(
        tmp_path / "rows.jsonl",
        {"messages": [{"role": "user", "content": texts}, answer], "tools": '[{"type": "function"}]'},
        {"messages": [{"role": "user", "content": "use a tool"}, call]},
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}, answer]},
        {"messages": [question, {"role": "assistant", "content": None}]},
        {"messages": [question, {"role": "assistant", "content": float("nan")}]},
        {"messages": [{"from": "narrator", "value": "Once."}, question, answer]},
        {"messages": [question, answer], "tools": ["ls"]},
    )
    raw, _ = load_rows(path)
    kept, report = clean_rows(raw, chat(QWEN2), max_length=100, on_long="drop", loss_on="completion")
    assert [row.origin for row in kept] == ["rows.jsonl:1", "rows.jsonl:2"]
    assert kept[0].messages == (question, answer)
    assert kept[0].tools == ({"type": "function"},)
    assert (report.unreadable, report.refused_by_template) == (4, 1)
    told = "\n".join(report.lines())
    assert "4 dropped: of a wrong form (the first is rows.jsonl:3: a message has a part that is not a text)" in told
    assert "(the first is rows.jsonl:6: unknown role 'narrator')" in told
    kept, report = clean_rows(raw, chat(CHATML), max_length=100, on_long="drop", loss_on="completion")
    assert (len(kept), report.refused_by_template) == (0, 3)
    assert "rows.jsonl:1: tools are given, but the model's chat template does not write them" in "\n".join(
        report.lines()
    )


def test_a_cell_that_is_not_a_number_is_empty(tmp_path: Path) -> None:
    nan = float("nan")
    path = write(
        tmp_path / "rows.jsonl",
        {"prompt": "a", "completion": nan},
        {"prompt": nan, "completion": "b"},
        {"prompt": 1.5, "completion": 2},
    )
    raw, _ = load_rows(path)
    kept, report = clean_rows(raw, chat(CHATML), max_length=100, on_long="drop", loss_on="completion")
    assert [(row.prompt, row.answer) for row in kept] == [("1.5", "2")]
    assert report.empty == 2


def test_openais_files_are_read_as_the_model_will_be_served(tmp_path: Path) -> None:
    question, answer = DIALOG[:2]
    call = {"id": "1", "type": "function", "function": {"name": "ls", "arguments": '{"path": "ü <b>"}'}}
    path = write(
        tmp_path / "rows.jsonl",
        {"messages": [question, {"role": "assistant", "content": None, "tool_calls": [call]}], "tools": [CALL]},
        {"messages": [{"role": "User", "content": "copy"}, answer]},
        {"messages": [question, {**answer, "function_call": {"name": "ls", "arguments": "{}"}}]},
        {"messages": [question, answer], "functions": [{"name": "ls"}]},
        {"messages": [question, {**answer, "weight": 0.5}]},
        {
            "messages": [
                question,
                {"role": "assistant", "tool_calls": [{"function": {"name": "ls", "arguments": "ls"}}]},
            ]
        },
    )
    raw, _ = load_rows(path)
    assert [row.problem for row in raw] == [
        None,
        None,
        "a message has a function_call, an old form of OpenAI's: write it as tool_calls",
        "its functions are an old form of OpenAI's: write them as tools",
        "a message has the weight 0.5: write 1, or 0 for an answer not to be learned",
        "the arguments of a tool call are 'ls': write a JSON object",
    ]
    assert raw[1].row.messages[0]["role"] == "user"
    assert supervised_text(chat(QWEN2), raw[0].row) == '<tool_call>ls {"path": "ü <b>"}</tool_call><|im_end|>'


def test_an_answer_of_weight_0_is_not_learned(tmp_path: Path) -> None:
    messages = [{**message, "weight": int(i > 1)} if i % 2 else message for i, message in enumerate(DIALOG)]
    [raw], _ = load_rows(write(tmp_path / "rows.jsonl", {"messages": messages}))
    own = chat(CHATML)
    assert supervised_text(own, raw.row) == supervised_text(own, Row(DIALOG), "last-turn")
    both = supervised_text(own, Row(DIALOG), "all")
    first = DIALOG[1]["content"] + "<|im_end|>"
    assert supervised_text(own, raw.row, "all") == both.replace(first, "", 1)
    learned = {"messages": [DIALOG[0], {**DIALOG[1], "weight": 0}]}
    raw, _ = load_rows(write(tmp_path / "none.jsonl", learned))
    kept, report = clean_rows(raw, own, max_length=100, on_long="drop", loss_on="completion")
    assert (kept, report.nothing_supervised) == ([], 1)


def test_a_cell_that_is_not_a_text_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.xlsx"
    book = openpyxl.Workbook()
    for row in (("prompt", "completion"), ("when", datetime.date(2024, 5, 1)), ("how many", 3.0), ("is it", True)):
        book.active.append(row)
    book.save(path)
    raw, _ = load_rows(str(path))
    assert raw[0].problem == "'completion' holds a date: format the column as text"
    assert [row.row.answer for row in raw[1:]] == ["3", "true"]
    [raw_row], _ = load_rows(write(tmp_path / "a.jsonl", {"instruction": "a", "input": ["b"], "output": "c"}))
    assert raw_row.problem == "'input' holds a list, not a text"
    [raw_row], _ = load_rows(write(tmp_path / "b.jsonl", {"prompt": ["a"], "completion": ["b"]}))
    assert raw_row.problem == "'prompt' holds a list, not a text"
    [raw_row], _ = load_rows(
        write(tmp_path / "c.jsonl", {"messages": [{"role": "user", "content": "a" * 1_000_001}, DIALOG[1]]})
    )
    assert raw_row.problem == "a message has more than 1,000,000 characters"


def test_lists_in_a_csv_may_be_in_pythons_words(tmp_path: Path) -> None:
    with (tmp_path / "a.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([["messages"], [str(list(DIALOG))], [json.dumps(DIALOG)], ["[{'role': user}]"]])
    raw, _ = load_rows(str(tmp_path / "a.csv"))
    assert [row.row.messages for row in raw[:2]] == [DIALOG, DIALOG]
    assert raw[2].problem == "a cell that should hold JSON does not"


def test_a_key_given_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a", "completion": "b", "prompt": "c"}\n')
    with pytest.raises(DataError, match="line 2 is not JSON: an object has 'prompt' twice"):
        load_rows(str(path))


def test_a_cut_row_without_a_supervised_token_is_not_trained_on() -> None:
    row = EncodedRow(np.arange(10), np.arange(10) >= 8)
    assert fit(row, 8, "truncate") == []
    assert fit(row, 8, "drop") == []
    [part] = fit(row, 7, "split")
    assert part.ids.tolist() == [7, 8, 9]
    assert fit(EncodedRow(np.arange(3), np.array([True, False, False])), 8, "drop") == [], "nothing predicts the first"


def test_near_duplicates_stay_together_and_leaks_are_dropped() -> None:
    prompts = [f"question {'abcdefghij'[i // 3]}{'.' * (i % 3)}" for i in range(30)]
    rows = [
        Row(({"role": "user", "content": p}, {"role": "assistant", "content": str(i)})) for i, p in enumerate(prompts)
    ]
    parts = split_rows(rows, validation=0.2, test=0.2, seed=1)
    assert sum(map(len, parts)) == 30
    assert all(parts)
    keys = [{row.prompt.rstrip(".") for row in part} for part in parts]
    assert sum(map(len, keys)) == len(keys[0] | keys[1] | keys[2])
    assert split_rows(rows[::-1], validation=0.2, test=0.2, seed=1)[2] != []
    kept, dropped = drop_leaks(rows, rows[:1])
    assert (len(kept), dropped) == (27, 3)
    with pytest.raises(DataError, match="too few"):
        split_rows(rows[:3], validation=0.2, test=0.2, seed=1)


def test_the_rows_of_the_tests_can_be_told_apart() -> None:
    assert len({row["prompt"] for row in command_rows()}) == 96
