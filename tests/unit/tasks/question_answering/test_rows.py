"""Reading questions from every format, cleaning, and splitting by context."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from paths import SHARED

from deploykit.errors import DataError, UsageError
from deploykit.tasks.question_answering.clean import clean
from deploykit.tasks.question_answering.rows import Example, RawRow, RightAnswers, read_rows
from deploykit.tasks.question_answering.split import drop_leaks, split, take

needs_data = pytest.mark.skipif(not SHARED.is_dir(), reason=f"{SHARED} is not here")


def _examples(path: Path) -> list[Example]:
    return clean(read_rows(str(path)))[0]


def _write(path: Path, content: Any) -> Path:
    text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
    path.write_bytes(text.encode())
    return path


def _squad(qas: list[dict[str, Any]], context: str = "Ann lives in Rome. Bob lives in Oslo.") -> dict[str, Any]:
    return {"data": [{"title": "t", "paragraphs": [{"context": context, "qas": qas}]}]}


def test_squad_versions_1_and_2_hub_rows_csv_and_json_lines_are_the_same_rows(tmp_path: Path) -> None:
    context = "Ann lives in Rome. Bob lives in Oslo."
    answers = {"text": ["Rome", "in Rome"], "answer_start": [13, 10]}
    as_objects = [{"text": t, "answer_start": s} for t, s in zip(answers["text"], answers["answer_start"])]
    rows = [
        {"id": "a", "question": "Where is Ann?", "context": context, "answers": answers},
        {"id": "b", "question": "Where is Cid?", "context": context, "answers": {"text": [], "answer_start": []}},
    ]
    one_answer = 'id,question,context,answer,answer_start\na,Where is Ann?,"{c}",Rome,13\nb,Where is Cid?,"{c}",,\n'
    of_squad = [
        {"id": "a", "question": "Where is Ann?", "answers": as_objects},
        {"id": "b", "question": "Where is Cid?", "answers": [], "is_impossible": True},
    ]
    packed = tmp_path / "squad.json.gz"
    packed.write_bytes(gzip.compress(json.dumps(_squad(of_squad)).encode("utf-8-sig")))
    for path in (
        _write(tmp_path / "squad.json", _squad(of_squad)),
        packed,
        _write(tmp_path / "rows.json", rows),
        _write(tmp_path / "rows.jsonl", "\n".join(json.dumps(row) for row in rows)),
        _write(tmp_path / "rows.csv", one_answer.format(c=context)),
    ):
        found = _examples(path)
        assert [(e.id, e.question, e.context) for e in found] == [(r["id"], r["question"], context) for r in rows], path
        assert found[0].answers.text[0] == "Rome"
        assert found[0].answers.answer_start[0] == 13
        assert found[1].answers == RightAnswers()
        assert len(found[0].answers.text) == (1 if path.suffix == ".csv" else 2)


_CARD = """---
configs:
- config_name: plain_text
  data_files:
  - {split: train, path: plain_text/train-*}
  - {split: validation, path: plain_text/validation-*}
---
"""


def _hub_rows(split: str, count: int) -> Any:
    """Return rows with the columns of the hub's ``squad_v2``; every third has no answer."""
    import datasets

    context = "Ann lives in Rome."
    full, none = {"text": ["Rome"], "answer_start": [13]}, {"text": [], "answer_start": []}
    return datasets.Dataset.from_dict(
        {
            "id": [f"{split}-{i}" for i in range(count)], "title": ["t"] * count, "context": [context] * count,
            "question": [f"Where, {i}?" for i in range(count)],
            "answers": [none if i % 3 == 2 else full for i in range(count)],
        }
    )  # fmt: skip


def _check_hub_rows(found: list[Example], count: int) -> None:
    assert [e.id for e in found] == [f"train-{i}" for i in range(count)]
    assert [e.answers for e in found[:3]] == [RightAnswers(("Rome",), (13,))] * 2 + [RightAnswers()]


def test_rows_of_the_hubs_squad_are_read_whole_from_what_a_user_may_have(tmp_path: Path) -> None:
    """A saved dataset, one with splits, a file, and the repository as `hf download` writes it."""
    import datasets

    count = 2500  # more than two batches of 1,000
    rows, others = _hub_rows("train", count), _hub_rows("validation", 5)
    rows.save_to_disk(str(tmp_path / "saved"))
    datasets.DatasetDict({"train": rows, "validation": others}).save_to_disk(str(tmp_path / "splits"))
    folder = tmp_path / "squad"
    (folder / "plain_text").mkdir(parents=True)
    (folder / "README.md").write_text(_CARD)
    rows.select(range(2000)).to_parquet(str(folder / "plain_text/train-00000-of-00002.parquet"))
    rows.select(range(2000, count)).to_parquet(str(folder / "plain_text/train-00001-of-00002.parquet"))
    others.to_parquet(str(folder / "plain_text/validation-00000-of-00001.parquet"))
    rows.to_parquet(str(tmp_path / "squad.parquet"))
    for path in (tmp_path / "saved", tmp_path / "splits", folder, tmp_path / "squad.parquet"):
        _check_hub_rows(_examples(path), count)
    assert len(list(read_rows(str(folder), split="validation"))) == 5


def test_squad_by_its_hub_id_is_read_from_the_cache_without_a_network(tmp_path: Path) -> None:
    """The datasets library keeps what it loaded as ``cache/id/configuration/version/hash``."""
    from datasets import DatasetInfo
    from datasets.arrow_writer import ArrowWriter

    folder = tmp_path / "cache" / "squad" / "plain_text" / "0.0.0" / "a1b2"
    folder.mkdir(parents=True)
    rows = _hub_rows("train", 4)
    with ArrowWriter(path=str(folder / "squad-train.arrow"), features=rows.features) as writer:
        writer.write_table(rows.data.table)
        writer.finalize()
    splits: Any = {"train": {"name": "train", "num_examples": 4, "dataset_name": "squad"}}
    info = DatasetInfo(features=rows.features, builder_name="parquet", dataset_name="squad", config_name="plain_text",
                       version="0.0.0", splits=splits)  # fmt: skip
    info.write_to_directory(str(folder))
    script = (
        "import sys; from deploykit.tasks.question_answering.rows import read_rows; from deploykit.errors import DataError\n"
        "try: print(*(row.id for row in read_rows(sys.argv[1])))\n"
        "except DataError as error: print(error, error.remedy)"
    )
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(tmp_path / "cache"),
        "HF_HOME": str(tmp_path),
    }

    def read(source: str) -> str:
        words = (sys.executable, "-c", script, source)
        return subprocess.run(words, capture_output=True, text=True, check=True, env=environment).stdout

    assert read("squad").split() == [f"train-{i}" for i in range(4)]
    told = read("squad_v2")
    assert "its split 'train' cannot be loaded from the hub" in told
    assert "`hf download --repo-type dataset squad_v2 --local-dir FOLDER`" in told


def test_a_kept_split_reads_back_as_it_was(tmp_path: Path) -> None:
    from deploykit.training.rows import read_split, write_splits

    (example,) = _examples(_write(tmp_path / "a.json", _squad([_qa("Where is Ann?", "Rome", 13)])))
    write_splits(tmp_path / "splits", {"test": [example]})
    assert read_split(tmp_path, "test", Example) == [example]
    (again,) = _examples(tmp_path / "splits" / "test.jsonl")
    assert (again.question, again.context, again.answers) == (example.question, example.context, example.answers)


@pytest.mark.parametrize(
    ("context", "answer"),
    [
        ("a 😀😀 smile 😀 here", "smile"),
        ("cafe\u0301 e\u0301tape finale", "e\u0301tape"),
        ("line one\r\nline two", "line two"),
        ("它在北京市中心。", "北京"),
        ("价格是１２３元", "１２３"),
        ("many     spaces   here", "here"),
        ("family 👩‍👩‍👧 portrait", "👩‍👩‍👧"),
    ],
)
def test_places_are_code_points(context: str, answer: str, tmp_path: Path) -> None:
    start = context.index(answer)
    for path in (
        _write(tmp_path / "a.json", _squad([_qa("q", answer, start)], context)),
        _write(tmp_path / "a.csv", f'question,context,answer,answer_start\nq,"{context}",{answer},{start}\n'),
    ):
        (example,) = _examples(path)
        assert example.context == context
        assert example.answers == RightAnswers((answer,), (start,))


def _qa(question: str, text: str, start: int | None, **more: Any) -> dict[str, Any]:
    return {"id": question, "question": question, "answers": [{"text": text, "answer_start": start}], **more}


def test_a_misplaced_answer_is_moved_where_it_occurs_once_and_else_dropped_and_counted(tmp_path: Path) -> None:
    qas = [
        _qa("moved", "Rome", 3),
        _qa("beyond the end", "Oslo", 10_000),
        _qa("twice", "lives", 0),
        _qa("nowhere", "Paris", 0),
        _qa("spaces around", " Rome ", 12),
        _qa("no place", "Oslo", None),
    ]
    examples, report = clean(read_rows(str(_write(tmp_path / "a.json", _squad(qas)))))
    assert {e.id: e.answers.answer_start for e in examples} == {
        "moved": (13,), "beyond the end": (32,), "spaces around": (13,), "no place": (32,)
    }  # fmt: skip
    assert (report.answers_moved, report.misplaced_answer, report.answers_located) == (2, 2, 1)
    assert report.rows_read == report.rows_kept + report.misplaced_answer
    assert any("moved to the one place" in line for line in report.lines())


def test_unusable_rows_are_dropped_and_counted_and_control_characters_keep_places() -> None:
    def row(question: str | None, context: str | None, *answers: tuple[str, int | None]) -> RawRow:
        return RawRow(question, context, answers, True, "", f"rows:{question}")

    nul = "a\x00b \ud800 answer"
    examples, report = clean(
        [
            row(None, "text"), row("q", None), row(" ", "text"), row("q", " \r\n"),
            row("nul", nul, ("answer", nul.index("answer"))),
            row("Twice?", "one two", ("one", 0)), row("twice? ", "one two", ("two", 4)),
            row("twice?", "one two", ("one", 0)),
            row("both", "one two", ("one", 0)), row("both", "one two"),
            row("html", "<b>bold</b> &amp; <script>", ("bold", 3)),
        ]
    )  # fmt: skip
    by_question = {e.question: e for e in examples}
    assert by_question["nul"].context == "a b \ufffd answer"
    assert by_question["Twice?"].answers == RightAnswers(("one", "two"), (0, 4))
    assert by_question["html"].answers.answer_start == (3,)
    assert (report.missing_text, report.empty_text, report.unicode_repaired) == (2, 2, 1)
    assert (report.duplicates, report.conflicting_duplicates, report.rows_kept) == (2, 2, 3)


@needs_data
@pytest.mark.parametrize(("name", "questions", "wrong"), [("covidqa", 1380, 234), ("cmrc2018_trial", 1002, 5)])
def test_the_dirt_in_real_data_is_found(name: str, questions: int, wrong: int) -> None:
    raw = list(read_rows(str(SHARED / f"{name}.json")))
    misplaced = [
        row for row in raw for text, start in row.answers
        if row.context is not None and start is not None and not row.context.startswith(text, start)
    ]  # fmt: skip
    examples, report = clean(raw)
    assert (len(raw), len(misplaced)) == (questions, wrong)
    assert report.rows_kept + report.misplaced_answer + report.duplicates + report.empty_text == questions
    for example in examples:
        for text, start in zip(example.answers.text, example.answers.answer_start):
            assert example.context[start : start + len(text)] == text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"data": 1}', "data is not a list"),
        ('{"rows": []}', "without 'data'"),
        ('{"data": [{}]}', "article 1 has no 'paragraphs'"),
        ('{"data": [{"paragraphs": [{"qas": []}]}]}', "article 1, paragraph 1 has no 'context'"),
        (
            '{"data": [{"paragraphs": [{"context": "c", "qas": [{"question": 7}]}]}]}',
            "a.json:1: question is not a text",
        ),
        ('{"data": [', "is not JSON"),
        ('[{"question": "q"}]', "no column 'context'"),
        ('[{"question": "q", "context": ["c"]}]', "a.json:1: context is a list, not a text"),
        ('[{"question": {"text": "q"}, "context": "c"}]', "a.json:1: question is an object, not a text"),
        ('[{"question": "q", "context": "c", "answers": 5}]', "answers is neither"),
        ('[{"question": "q", "context": "c", "answers": {"text": ["c"], "answer_start": []}}]', "of one length"),
        ('[{"question": "q", "context": "c", "answer": "c", "answer_start": "x"}]', "a.json:1: answer_start is 'x'"),
        (
            '[{"question": "q", "context": "c", "answers": ["c"], "answer_start": [0, 1]}]',
            "1 answers and 2 places in answer_start",
        ),
        ('[{"question": "q", "context": "c", "answer": "c", "answer_start": [0]}]', r"answer_start is \[0\]"),
        ('[{"question": "q", "context": "c", "answer": "c", "answer_start": "0.5"}]', "answer_start is '0.5'"),
        ('[{"question": "q", "context": "c", "answers": "{\'text\': [\'c\']}"}]', "which is not JSON"),
        (
            '{"data": [{"paragraphs": [{"context": "c", "qas": [{"question": "q", "is_impossible": "no"}]}]}]}',
            "is_impossible is 'no'",
        ),
    ],
)
def test_a_malformed_file_is_refused_by_its_place(content: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        list(read_rows(str(_write(tmp_path / "a.json", content))))


def test_a_table_may_hold_a_start_as_float_and_answers_as_json(tmp_path: Path) -> None:
    context = "Ann lives in Rome."
    starts = f"question,context,answer,answer_start\na,{context},Rome,13.0\nb,{context},,\nc,{context},Rome,-5\n"
    answers = 'question,context,answers\na,{c},"{{""text"": [""Rome""], ""answer_start"": [13]}}"\nb,{c},[]\nc,{c},\n'
    for content, last in ((starts, ("Rome",)), (answers.format(c=context), ())):
        found = _examples(_write(tmp_path / "rows.csv", content))
        assert [e.answers.text for e in found] == [("Rome",), (), last]
        assert found[0].answers.answer_start == (13,)
    nan = '[{"question": "q", "context": "Ann lives in Rome.", "answer": "Rome", "answer_start": NaN}]'
    assert _examples(_write(tmp_path / "rows.json", nan))[0].answers.answer_start == (13,)


@pytest.mark.parametrize(
    ("answers", "starts", "places"),
    [
        (["c", "x"], [4, 2], (4, 2)),
        (["c"], 4, (4,)),
        (["c"], None, (0,)),
        ([], None, ()),
        ('["c", "x"]', "[4, 2]", (4, 2)),
    ],
)
def test_places_may_have_a_column_of_their_own(
    answers: Any, starts: Any, places: tuple[int, ...], tmp_path: Path
) -> None:
    row = {"question": "q", "context": "c x c", "answers": answers, "answer_start": starts}
    assert _examples(_write(tmp_path / "rows.json", [row]))[0].answers.answer_start == places


def test_a_row_of_a_table_may_say_that_there_is_no_answer(tmp_path: Path) -> None:
    context = "Ann lives in Rome."
    plausible = {"question": "q", "context": context, "is_impossible": True, "answers": ["Rome"]}
    table = f"question,context,answer,answers,is_impossible\nq,{context},Rome,,True\nr,{context},Rome,,false\ns,{context},Rome,,\n"
    assert _examples(_write(tmp_path / "rows.json", [plausible]))[0].answers == RightAnswers()
    assert _examples(_write(tmp_path / "only.json", [{**plausible, "answers": None}]))[0].answers == RightAnswers()
    none = {"question": "q", "context": context, "answers": [], "answer_start": -1}
    assert _examples(_write(tmp_path / "none.json", [none]))[0].answers == RightAnswers()
    found = _examples(_write(tmp_path / "rows.csv", table))
    assert [e.answers.text for e in found] == [(), ("Rome",), ("Rome",)]


def test_ids_are_texts_and_an_id_that_is_null_is_none(tmp_path: Path) -> None:
    qas = [{**_qa("q", "Rome", 13), "id": 7}, {**_qa("r", "Rome", 13), "id": None}]
    assert [row.id for row in read_rows(str(_write(tmp_path / "a.json", _squad(qas))))] == ["7", ""]


def test_rows_of_one_id_are_rows_of_their_own(tmp_path: Path) -> None:
    rows = [
        {"id": "1", "question": q, "context": "Ann lives in Rome.", "answer": a}
        for q, a in (("q", "Rome"), ("r", "Ann"))
    ]
    found = _examples(_write(tmp_path / "rows.json", rows))
    assert [(e.id, e.answers.text) for e in found] == [("1", ("Rome",)), ("1", ("Ann",))]


def _example(context: str, question: str) -> Example:
    return Example(question, context, RightAnswers(("x",), (0,)), question, question)


def test_no_context_is_in_two_splits_and_order_does_not_matter() -> None:
    examples = [_example(f"context number {c}", f"q{c}-{q}") for c in range(30) for q in range(1 + c % 4)]
    examples += [_example("CONTEXT, number  3!", "near duplicate")]
    parts = split(examples, validation=0.2, test=0.1, seed=1)
    contexts = [{e.context for e in part} for part in parts]
    assert not contexts[0] & contexts[1]
    assert not contexts[0] & contexts[2]
    assert not contexts[1] & contexts[2]
    assert sum(map(len, parts)) == len(examples)
    assert len(parts[1]) == pytest.approx(0.2 * len(examples), abs=4)
    (same,) = [part for part in parts if "near duplicate" in {e.id for e in part}]
    assert {"q3-0", "near duplicate"} <= {e.id for e in same}
    assert split(examples[::-1], validation=0.2, test=0.1, seed=1) == parts
    kept, leaks = drop_leaks(examples, parts[1])
    assert leaks == len(parts[1])
    assert not {e.context for e in kept} & contexts[1]
    assert len(take(examples, 10, seed=0)) == 10


def test_too_few_contexts_cannot_be_split() -> None:
    with pytest.raises(DataError, match="2 contexts are too few"):
        split([_example("a", "1"), _example("b", "2")], validation=0.1, test=0.1, seed=0)
    with pytest.raises(UsageError, match="do not leave rows"):
        split([_example("a", "1")], validation=0.6, test=0.5, seed=0)


def test_json_lines_may_be_named_json(tmp_path: Path) -> None:
    rows = [{"question": f"q{i}", "context": f"c{i}"} for i in range(2)]
    (tmp_path / "rows.json").write_text("\n".join(map(json.dumps, rows)))
    assert [(row.question, row.context) for row in read_rows(str(tmp_path / "rows.json"))] == [
        ("q0", "c0"),
        ("q1", "c1"),
    ]
