"""The page of answers: each is marked at its place in its context, and the right answers are underlined."""

from __future__ import annotations

import json
import re
from html import unescape
from pathlib import Path
from typing import Any

from html_page import Page
from tiny_answerer import write_export

from deploykit.tasks.opening import open_predictor
from deploykit.tasks.question_answering.page import write_page


def test_answers_are_marked_and_right_answers_underlined_at_their_places(tmp_path: Path) -> None:
    contexts = ["w0 <b>w1</b> & w2 w3", "w4 😀 w5 w4 w5 w6", "w7 " * 900 + "w8 w9"]
    rows = [
        {"question": f"after {context.split()[0]} ?", "context": context, "answer": answer, "answer_start": start}
        for context, answer, start in zip(contexts, ("w3", "w5", "w9"), (contexts[0].index("w3"), 11, 2703))
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    predictor: Any = open_predictor(str(write_export(tmp_path / "export")), url="", engine="onnxruntime", threads=1)
    assert write_page(predictor, "tiny", str(tmp_path / "rows.jsonl"), tmp_path / "page.html") == 3
    page = (tmp_path / "page.html").read_text()
    Page(page)
    articles = re.findall(r"<article><h2>(.*?)</h2>.*?<p>(.*?)</p></article>", page, re.DOTALL)
    assert len(articles) == 3
    for question, shown in articles:
        [row] = [row for row in rows if row["question"] == unescape(question)]
        context = row["context"]
        (answer,) = predictor.answer(row["question"], context)
        whole = unescape(re.sub(r"</?(?:mark|u)>", "", shown))
        parts = whole.split("…")
        assert all(part in context for part in parts)
        assert ("…" in whole) == (len(context) > 2000)
        marked = "".join(re.findall("<mark>(.*?)</mark>", shown))
        assert unescape(re.sub("</?u>", "", marked)) == answer.text
        before = re.sub("</?(?:mark|u)>", "", shown.partition("<mark>")[0])
        assert context[: answer.start].endswith(unescape(before.rpartition("…")[2]))
        underlined = "".join(re.findall("<u>(.*?)</u>", re.sub("</?mark>", "", shown).replace("</u><u>", "")))
        assert unescape(underlined) == row["answer"]
