"""Measure classification in one run: PyTorch, ONNX Runtime, OpenVINO and CTranslate2, each used as documented, and
deploykit.

All have the same weights, rows and threads. Then it measures servers with the same model behind each. The datasets are
the demo's tweets and BBC articles (``articles.py`` trains that model). Writes bench/results/<date>-classification.json
and .html.
"""

from __future__ import annotations

import argparse
import datetime
import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from classification_contenders import (
    CALIBRATION_ROWS,
    CONTENDERS,
    Contender,
    Subject,
    job_of,
    missing,
    open_contender,
    prepare,
    size_mb,
)
from classification_serving import MODEL, deploykit_server, measure_serving
from suite import begin, candidate, measured_alone, say, write

from deploykit.bench.rows import read_rows
from deploykit.bench.run import Candidate, run_bench
from deploykit.bench.scenarios import ClosedLoop, Scenario, Server
from deploykit.hardware import available_cpus

ROOT = Path(__file__).parents[1]
PARTS = ("tweets", "articles", "serving")


def main() -> None:
    options = _options()
    skipped = {c.name: reason for c in CONTENDERS if (reason := missing(c))}
    suite = begin("classification.py", options.threads, skipped, ("nncf", "ctranslate2", "fastapi", "uvicorn"))
    if options.add:
        keep_other_parts(suite, json.loads(options.out.read_text(encoding="utf-8")), options.parts)
    for part in ("tweets", "articles"):
        checkpoint, export = getattr(options, part)
        if part in options.parts and not (checkpoint.is_dir() and export.is_dir()):
            suite["skipped"][part] = f"there is no {checkpoint} or no {export}"
        elif part in options.parts:
            with tempfile.TemporaryDirectory() as made:
                suite["workloads"] += measure_subject(
                    part, Subject(checkpoint, export, Path(made)), options, suite["skipped"]
                )
            write(suite, options.out)  # save now, because the next part takes long, and may fail
    if "serving" in options.parts:
        checkpoint, export = options.tweets
        with tempfile.TemporaryDirectory() as made:
            subject = Subject(checkpoint, export, Path(made))
            texts, _ = _rows(subject, options.max_rows)
            suite["serving"] = measure_serving(subject, texts, rounds=options.rounds, seconds=options.seconds, say=say)
    write(suite, options.out)


def keep_other_parts(suite: dict[str, Any], earlier: dict[str, Any], parts: Sequence[str]) -> None:
    """Copy the parts of ``earlier`` that are not in ``parts`` to ``suite``, and record their origin."""
    suite["workloads"] += [each for each in earlier["workloads"] if each["key"].split("-")[0] not in parts]
    if "serving" in earlier and "serving" not in parts:
        suite["serving"] = earlier["serving"]
    suite["skipped"] = earlier["skipped"] | suite["skipped"]
    suite["earlier"] = [*earlier.get("earlier", ()), {key: earlier[key] for key in ("started", "command")}]


def measure_subject(
    key: str, subject: Subject, options: argparse.Namespace, skipped: dict[str, str]
) -> Iterator[dict[str, Any]]:
    """Return two records: 1 and 32 callers, with our own server; and all texts in one call.

    Adds contenders that could not take part to ``skipped``, with the reason.
    """
    texts, truth = _rows(subject, options.max_rows)
    train = str(subject.checkpoint / "splits" / "train.jsonl")
    calibration, _ = read_rows(train, subject.task, most=CALIBRATION_ROWS, seed=0)
    candidates = []
    for contender in CONTENDERS:
        if contender.name not in options.contenders or contender.name in skipped:
            continue
        say(f"opening {contender.name} ({key})")
        try:
            prepare(contender, subject, calibration)
        except ValueError as error:
            skipped[f"{contender.name} ({key})"] = str(error)
            continue
        candidates.append(_candidate(contender, subject, texts, options))
    settings = {"rounds": options.rounds, "seconds": options.seconds, "warmup_s": 0.5, "progress": say}
    with tempfile.TemporaryDirectory() as folder, deploykit_server(subject, Path(folder)) as url:
        served = Candidate("deploykit, served", Server(url, MODEL, subject.task))
        callers: list[Scenario] = [ClosedLoop(1), ClosedLoop(32)]
        yield {"key": key, "bench": run_bench([*candidates, served], texts, truth, callers, **settings).to_json()}
    everything = [ClosedLoop(len(texts))]
    yield {"key": f"{key}-offline", "bench": run_bench(candidates, texts, truth, everything, **settings).to_json()}


def _candidate(contender: Contender, subject: Subject, texts: Sequence[str], options: argparse.Namespace) -> Candidate:
    hidden = ["torch"] if contender.engine == "CTranslate2" else []
    job = job_of(contender, subject, options.threads)
    alone = measured_alone(contender, "classification_contenders", hidden, job, texts, times=1 if options.quick else 3)
    return candidate(contender, open_contender(contender, subject, options.threads), size_mb(contender, subject), alone)


def _rows(subject: Subject, most: int) -> tuple[list[str], list[str] | None]:
    return read_rows(str(subject.checkpoint / "splits" / "test.jsonl"), subject.task, most=most, seed=0)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    for part, name in (("tweets", "sentiment"), ("articles", "bbc")):
        parser.add_argument(
            f"--{part}",
            nargs=2,
            type=Path,
            metavar=("CHECKPOINT", "EXPORT"),
            default=(ROOT / f"demo/runs/{name}", ROOT / f"demo/exports/{name}"),
        )
    names = [contender.name for contender in CONTENDERS]
    parser.add_argument("--contenders", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--add", action="store_true", help="to the record in --out, which keeps its other parts")
    parser.add_argument("--threads", type=int, default=available_cpus())
    parser.add_argument("--max-rows", type=int, default=480, help="of the test split")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each measurement")
    parser.add_argument("--quick", action="store_true", help="see that it works: each process of its own once")
    default = ROOT / "bench" / "results" / f"{datetime.date.today()}-classification.json"
    parser.add_argument("--out", type=Path, default=default)
    return parser.parse_args()


if __name__ == "__main__":
    main()
