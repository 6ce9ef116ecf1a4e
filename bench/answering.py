"""Compare question answering: training with a plain Trainer, spans and speed with transformers' pipeline.

A MiniLM is trained on XQuAD (``--data``, the folder with xquad.en.json and covidqa.json) for some minutes. The speed of
deploykit is compared with transformers' QuestionAnsweringPipeline on PyTorch, on optimum's ONNX Runtime models, and on
OpenVINO (INT8 by NNCF): all test questions in one call, and one question at a time on a long article. Each contender
runs in a separate process, and they take turns. Writes bench/results/<date>-answering.json.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from answering_families import FAMILIES, write_family
from answering_peers import CONTENDERS, Answers, Peer, Subject, job_of, missing
from answering_training import OPTIONS, ROOT, compare, graded, train, train_plainly
from suite import begin, say, write_record

from deploykit.bench.machine import other_load
from deploykit.bench.run import spread
from deploykit.data.sample import evenly
from deploykit.hardware import available_cpus
from deploykit.tasks.question_answering.facts import QuestionAnswering
from deploykit.tasks.question_answering.rows import Example, read_rows
from deploykit.training.rows import read_split

PARTS = ("training", "spans", "short", "article")
DATA = ("xquad.en", "xquad.de", "xquad.zh", "covidqa")
WINDOWS = QuestionAnswering(OPTIONS["max_length"], OPTIONS["doc_stride"], 0)
"""Sizes of windows."""

Pairs = list[tuple[str, str]]


def main() -> None:
    options = _options()
    skipped = {c.name: reason for c in CONTENDERS if (reason := missing(c))}
    suite = begin("answering.py", options.threads, skipped, ("nncf", "transformers"))
    suite["load_before"] = other_load().to_json()
    if options.add:
        earlier = json.loads(options.out.read_text(encoding="utf-8"))
        suite |= {
            part: earlier[part] for part in PARTS if part in earlier and (part not in options.parts or part == "spans")
        }
        suite["earlier"] = [*earlier.get("earlier", ()), {key: earlier[key] for key in ("started", "command")}]
    if "spans" in options.parts:
        kept = [line for line in suite.get("spans", ()) if line["family"] not in options.families]
        for family in options.families:
            kept += compare_spans(family, options.data, options.folder, options.every, options.threads)
            suite["spans"] = kept
            write_record(suite, options.out)
    if {"training", "short", "article"} & {*options.parts}:
        export = train(options.model, options.data / "xquad.en.json", options.folder)
        subject = Subject(options.folder / "run", export, options.folder)
        if "training" in options.parts:
            plain = train_plainly(options.model, options.folder)
            suite["training"] = compare(subject, plain, options.threads)
            write_record(suite, options.out)
        able = [c for c in CONTENDERS if c.name not in skipped]
        with contextlib.ExitStack() as stack:
            peers = [
                stack.enter_context(Peer(c.name, job_of(c, subject), subject.task, options.threads))
                for c in (able if {"short", "article"} & {*options.parts} else ())
            ]
            if "short" in options.parts:
                suite["short"] = measure_short(peers, subject, options.rounds, options.max_rows)
            if "article" in options.parts:
                suite["article"] = measure_article(peers, options.data, options.rounds, options.questions)
    write_record(suite, options.out)


def compare_spans(family: str, data: Path, folder: Path, every: dict[str, int], threads: int) -> list[dict[str, Any]]:
    """Run a random model of ``family`` with transformers' pipeline and with deploykit on PyTorch.

    Returns, for each data set, the number of questions and of equal spans, and some that differ.
    """
    asked = {name: _pairs(data / f"{name}.json")[:: every[name]] for name in DATA}
    texts = sorted({context for name in DATA[:3] for _, context in _pairs(data / f"{name}.json")})
    found = []
    checkpoint = folder / "families" / family
    if not checkpoint.exists():
        write_family(checkpoint, family, texts, length=WINDOWS.max_length)
    theirs, ours = (
        stack_of_answers(engine, checkpoint, asked, threads) for engine in ("transformers", "deploykit checkpoint")
    )
    for name, pairs in asked.items():
        differ = [
            {"question": question, "pipeline": a, "deploykit": b}
            for (question, context), a, b in zip(pairs, theirs[name], ours[name], strict=True)
            if trimmed(a, context) != b[1:]
        ]
        say(f"{family}, {name}: {len(pairs) - len(differ)} of {len(pairs)} spans equal")
        found.append({"family": family, "data": name, "questions": len(pairs),
                      "equal": len(pairs) - len(differ), "differ": differ[:5]})  # fmt: skip
    return found


def stack_of_answers(engine: str, checkpoint: Path, asked: dict[str, Pairs], threads: int) -> dict[str, Answers]:
    """Return the answers to each data set's questions by one engine."""
    with Peer(engine, {"engine": engine, "folder": str(checkpoint)}, WINDOWS, threads) as peer:
        return {name: peer.answer([pairs])[1] for name, pairs in asked.items()}


def trimmed(answer: tuple[str, int, int], context: str) -> tuple[int, int]:
    """Return start and end without outer white space, which the pipeline leaves in a word of some tokenizers."""
    _, start, end = answer
    while start < end and context[start].isspace():
        start += 1
    while start < end and context[end - 1].isspace():
        end -= 1
    return start, end


def measure_short(peers: Sequence[Peer], subject: Subject, rounds: int, most: int) -> dict[str, Any]:
    """Answer up to ``most`` test questions in one call: questions/s, exact match and F1 in percent."""
    rows = evenly(read_split(subject.run, "test", Example), most)
    pairs = [(row.question, row.context) for row in rows]
    speeds: dict[str, list[float]] = {peer.name: [] for peer in peers}
    answers: dict[str, Answers] = {}
    for peer in peers:
        peer.answer([pairs[:2]])  # kernels are compiled, memory is touched
    for number in range(rounds):
        for peer in peers:
            (seconds,), answers[peer.name] = peer.answer([pairs])
            speeds[peer.name].append(len(pairs) / seconds)
            say(f"round {number + 1}: {peer.name}: {speeds[peer.name][-1]:.1f} questions/s")
    return {
        "questions": len(rows),
        "contexts": len({row.context for row in rows}),
        "contenders": [
            {
                "name": peer.name,
                "open_s": peer.open_s,
                "questions_per_s": spread(speeds[peer.name]),
                **dict(zip(("exact_match", "f1"), graded(subject.task, answers[peer.name], rows))),
            }
            for peer in peers
        ],
    }


def measure_article(peers: Sequence[Peer], data: Path, rounds: int, questions: int) -> dict[str, Any]:
    """Answer questions on the article with the length nearest to the mean, one per call: median time; then in one call."""
    by_article: dict[str, Pairs] = {}
    for pair in _pairs(data / "covidqa.json"):
        by_article.setdefault(pair[1], []).append(pair)
    mean = float(np.mean([len(article) for article in by_article]))
    able = [article for article, pairs in by_article.items() if len(pairs) >= questions]
    article = min(able, key=lambda text: abs(len(text) - mean))
    pairs = evenly(by_article[article], questions)
    alone: dict[str, list[float]] = {peer.name: [] for peer in peers}
    together: dict[str, list[float]] = {peer.name: [] for peer in peers}
    answers: dict[str, Answers] = {}
    for peer in peers:
        peer.answer([pairs[:1]])
    for number in range(rounds):
        for peer in peers:
            seconds, answers[peer.name] = peer.answer([[pair] for pair in pairs])
            alone[peer.name].append(1000 * float(np.median(seconds)))
            (whole,), _ = peer.answer([pairs])
            together[peer.name].append(len(pairs) / whole)
            say(f"round {number + 1}: {peer.name}: {alone[peer.name][-1]:.0f} ms, {together[peer.name][-1]:.2f} /s")
    base = answers[peers[0].name]
    return {
        "characters": len(article),
        "questions": len(pairs),
        "contenders": [
            {
                "name": peer.name,
                "p50_ms": spread(alone[peer.name]),
                "questions_per_s": spread(together[peer.name]),
                "same_answers": float(np.mean([a[0] == b[0] for a, b in zip(answers[peer.name], base)])),
            }
            for peer in peers
        ],
    }


def _pairs(path: Path) -> Pairs:
    rows: Iterator[tuple[str | None, str | None]] = ((row.question, row.context) for row in read_rows(str(path)))
    return [(question, context) for question, context in rows if question and context and question.strip()]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=ROOT / "demo/minilm", help="checkpoint to train")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared/data", help="folder of SQuAD-format files")
    parser.add_argument("--folder", type=Path, default=ROOT / "demo/answering-bench", help="where runs are kept")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--add", action="store_true", help="to the record in --out, which keeps its other parts")
    parser.add_argument("--threads", type=int, default=available_cpus())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max-rows", type=int, default=240, help="part short: questions of the test split")
    parser.add_argument("--questions", type=int, default=4, help="part article: questions on the article")
    parser.add_argument("--every", type=int, nargs=len(DATA), default=(3, 3, 3, 12), metavar="N",
                        help=f"part spans: ask every N-th question of {', '.join(DATA)}")  # fmt: skip
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=FAMILIES,
                        help="part spans: --add keeps the record's other families")  # fmt: skip
    default = ROOT / "bench" / "results" / f"{datetime.date.today()}-answering.json"
    parser.add_argument("--out", type=Path, default=default)
    options = parser.parse_args()
    options.every = dict(zip(DATA, options.every))
    if not options.data.is_dir():
        parser.exit(
            message=f"skipped: there is no {options.data}, a folder with xquad.en.json and covidqa.json (--data)\n"
        )
    return options


if __name__ == "__main__":
    main()
