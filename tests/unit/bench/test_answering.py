"""bench/answering.py: the plain Trainer's windows and labels, positions, and the tables of a record."""

from __future__ import annotations

import importlib
import json
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from paths import ROOT
from tiny_answerer import CONTEXT, FAMILIES, WORDS, write_checkpoint

from deploykit.tasks.question_answering.checkpoint import TorchAnswerer
from deploykit.tasks.question_answering.rows import Example, RightAnswers
from deploykit.tasks.question_answering.training import label_windows


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """Import a module of bench/."""
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    return importlib.import_module


@pytest.mark.parametrize("family", FAMILIES)
def test_the_plain_trainer_sees_the_same_windows_and_labels(
    bench: Callable[[str], Any], family: str, tmp_path: Path
) -> None:
    answerer = TorchAnswerer.load(write_checkpoint(tmp_path / "model", family))
    contexts = [f"{CONTEXT} {' '.join(WORDS[:60])} w77", "w1 w2 w3", " ".join(WORDS[100:190])]
    answers = ["steht dort", "w2 w3", "w150"]
    examples = [
        Example(f"w{i} ?", context, RightAnswers((answer,), (context.index(answer),)), str(i), "")
        for i, (context, answer) in enumerate(zip(contexts, answers, strict=True))
    ]
    rows = [json.loads(json.dumps({"question": e.question, "context": e.context, "answers": vars(e.answers)}))
            for e in examples]  # fmt: skip
    task = answerer.task
    theirs = list(
        bench("answering_trainer").labelled_windows(rows, answerer.hub_tokenizer, task.max_length, task.doc_stride)
    )
    ours = label_windows(answerer.tokenizer, examples)
    assert [w["input_ids"] for w in theirs] == [w.ids for w in ours.windows]
    assert [(w["start_positions"], w["end_positions"]) for w in theirs] == ours.labels


def test_outer_white_space_is_no_part_of_an_answer(bench: Callable[[str], Any]) -> None:
    trimmed = bench("answering").trimmed
    assert trimmed((" a b\n", 1, 6), "x a b\ny") == (2, 5)
    assert trimmed(("", 3, 3), "abc ") == (3, 3)


def test_a_record_is_shown_in_ratios_to_transformers() -> None:
    spread = {"median": 10.0, "min": 9.0, "max": 12.0}
    contenders = [
        {"name": "transformers fp32", "questions_per_s": spread, "f1": 50.0, "exact_match": 40.0, "p50_ms": spread},
        {"name": "deploykit native int8", "questions_per_s": {"median": 31.0, "min": 30.0, "max": 33.0}, "f1": 50.2,
         "exact_match": 40.5, "p50_ms": spread},
    ]  # fmt: skip
    record = {
        "started": "2026-12-01T10:00:00+00:00", "machine": {"cpu": "a CPU", "cpus_usable": 2}, "threads": 2,
        "short": {"questions": 240, "contexts": 100, "contenders": contenders},
        "article": {"characters": 23456, "questions": 4, "contenders": contenders},
        "spans": [{"family": "bert", "data": "xquad.en", "questions": 1000, "equal": 999}],
        "training": {"rows": 593, "train_rows": 592, "same_answers": 0.99, "trainer": {"exact_match": 40.0, "f1": 50.1},
                     "deploykit": {"exact_match": 40.0, "f1": 50.0, "f1_interval": [48.0, 52.0]}},
    }  # fmt: skip
    shown = runpy.run_path(str(ROOT / "bench" / "table.py"))["render_answering"](record).splitlines()
    assert "| deploykit native int8 | 40.5 | 50.2 | 31 | 3.10 (3.00 to 3.30) |" in shown
    assert "| deploykit native int8 | 10 (9 to 12) | 31 | 3.10 (3.00 to 3.30) |" in shown
    assert "| bert | 999 of 1,000 |" in shown
    assert any("999 of 1,000 spans (99.90%)" in line for line in shown)
    assert "| `deploykit finetune` (95 % interval) | 40.0 | 50.0 (48.0 to 52.0) |" in shown
