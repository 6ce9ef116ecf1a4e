"""Measure one export's throughput, latency and memory by batch, length, threads, instances, models and hours.

Each axis is one bench whose candidates are the export at each value. They take turns, so that a drift of the machine
affects all alike. For hours, the candidates are one server at successive times. Writes
bench/results/<date>-scaling.json and .html; bench/nodes.py computes from them the load that a node carries.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import itertools
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from suite import begin, say, write

from deploykit.artifacts import load_manifest
from deploykit.bench.rows import read_rows
from deploykit.bench.run import Candidate, run_bench
from deploykit.bench.scenarios import ClosedLoop, Scenario, Server, Within
from deploykit.hardware import available_cpus
from deploykit.runtime.serving_settings import ServingSettings
from deploykit.runtime.tokenizer import TextTokenizer
from deploykit.tasks.classification.facts import Classification
from deploykit.tasks.opening import Predictor, open_predictor
from deploykit.tasks.protocol import TaskFacts
from deploykit.tasks.translation.tokenizer import load_translation_tokenizer
from deploykit.text import normalize
from deploykit.triton.repository import package
from deploykit.triton.server import TritonServer

ROOT = Path(__file__).parents[1]
AXES = ("batch", "length", "threads", "instances", "models")
HOURS = "hours"  # takes hours, so it is measured only when named
_TEXTS_OF_A_LENGTH = 64
_UNLIMITED = 1 << 20
_LONE_AND_MANY: tuple[Scenario, ...] = (ClosedLoop(1), ClosedLoop(32))


def main() -> None:
    options = _options()
    task = load_manifest(options.export, "export").task
    texts, _ = read_rows(str(options.data), task, most=options.max_rows, seed=0)
    suite = begin("scaling.py", options.threads, {}, ())
    settings = {"rounds": options.rounds, "seconds": options.seconds, "warmup_s": options.warmup, "progress": say}
    sweeps: Mapping[str, Callable[[], Any]] = {
        "batch": lambda: _batch(options),
        "length": lambda: _length(options, task, texts, suite["skipped"]),
        "threads": lambda: _threads(options),
        "instances": lambda: _instances(options, task),
        "models": lambda: _models(options, task),
        HOURS: lambda: _hours(options, task),
    }
    for axis in options.axes:
        say(f"scaling with {axis}")
        own = {"rounds": 1, "seconds": 3600 * options.hours / options.windows} if axis == HOURS else {}
        with sweeps[axis]() as (candidates, scenarios):
            result = run_bench(list(candidates.values()), texts, scenarios=scenarios, **{**settings, **own})
        values = {candidate.name: value for value, candidate in candidates.items()}
        # For batches, the closed loops are the axis; the page of every bench plots them.
        swept = {} if axis == "batch" else {"axis": axis, "values": values}
        suite["workloads"].append({"key": axis, **swept, "bench": result.to_json()})
    write(suite, options.out)


Swept = Iterator[tuple[dict[float, Candidate], Sequence[Scenario]]]
"""Candidates by their value of the axis, and their load."""


@contextlib.contextmanager
def _batch(options: argparse.Namespace) -> Swept:
    with _opened(options, options.threads) as predictor:
        yield {1: Candidate(options.export.name, predictor)}, [ClosedLoop(n) for n in options.batches]


@contextlib.contextmanager
def _length(options: argparse.Namespace, task: TaskFacts, texts: Sequence[str], skipped: dict[str, str]) -> Swept:
    """Return a candidate with its own texts for each length, on one opened model."""
    count = token_counter(options.export, task)
    with _opened(options, options.threads) as predictor:
        candidates: dict[float, Candidate] = {}
        for n in options.lengths:
            if n > _longest(task):
                skipped[f"{n} tokens"] = f"the model takes {_longest(task)}"
            elif made := texts_of(n, texts, count):
                candidates[n] = Candidate(f"{n} tokens", predictor, texts=made)
            else:
                skipped[f"{n} tokens"] = "no words of the texts that follow each other have just so many"
        yield candidates, _LONE_AND_MANY


@contextlib.contextmanager
def _threads(options: argparse.Namespace) -> Swept:
    with contextlib.ExitStack() as stack:
        opened = {n: stack.enter_context(_opened(options, n)) for n in options.thread_counts}
        yield {n: Candidate(f"{n} thread{'s' * (n > 1)}", p) for n, p in opened.items()}, _LONE_AND_MANY


@contextlib.contextmanager
def _instances(options: argparse.Namespace, task: TaskFacts) -> Swept:
    """Return servers side by side; an idle one takes memory but no time."""
    with contextlib.ExitStack() as stack:
        candidates: dict[float, Candidate] = {}
        for n in options.instances:
            server = stack.enter_context(_served(options, ServingSettings(instances=n)))
            candidates[n] = Candidate(f"{n} instance{'s' * (n > 1)}", Server(server.urls.http, _model(0), task))
        yield candidates, [*_LONE_AND_MANY, Within(options.p99_limit)]


@contextlib.contextmanager
def _models(options: argparse.Namespace, task: TaskFacts) -> Swept:
    """Return servers with several models each, one of which gets requests."""
    with contextlib.ExitStack() as stack:
        candidates: dict[float, Candidate] = {}
        for n in options.models:
            server = stack.enter_context(_served(options, ServingSettings(), models=n))
            candidates[n] = Candidate(f"{n} model{'s' * (n > 1)}", Server(server.urls.http, _model(0), task))
        yield candidates, _LONE_AND_MANY


@contextlib.contextmanager
def _hours(options: argparse.Namespace, task: TaskFacts) -> Swept:
    """Return one server under continuous load, by the time at which each window ends."""
    with _served(options, ServingSettings()) as server:
        target = Server(server.urls.http, _model(0), task)
        ends = [round(i * options.hours / options.windows, 2) for i in range(1, options.windows + 1)]
        yield {hour: Candidate(f"{hour:g} hours", target) for hour in ends}, [ClosedLoop(8)]


@contextlib.contextmanager
def _served(options: argparse.Namespace, settings: ServingSettings, models: int = 1) -> Iterator[TritonServer]:
    with tempfile.TemporaryDirectory() as folder:
        for i in range(models):
            package(
                options.export, _model(i), Path(folder), engine=options.engine, precision=options.precision,
                settings=settings, stream=False,
            )  # fmt: skip
        with TritonServer(Path(folder), http_port=0, grpc_port=0, metrics_port=0) as server:
            yield server


def _model(i: int) -> str:
    return f"model{i}"


@contextlib.contextmanager
def _opened(options: argparse.Namespace, threads: int) -> Iterator[Predictor]:
    predictor = open_predictor(
        str(options.export), url="", engine=options.engine, precision=options.precision, threads=threads
    )
    try:
        yield predictor
    finally:
        predictor.close()


def token_counter(export: Path, task: TaskFacts) -> Callable[[str], int]:
    """Return a function that counts a text's tokens, special tokens included, before truncation."""
    if isinstance(task, Classification):
        tokenizer = TextTokenizer(export / "tokenizer.json", _UNLIMITED)
        return lambda text: len(tokenizer.encode([(normalize(text),)]).ids[0])
    translation = load_translation_tokenizer(export, task.source, task.target)
    return lambda text: len(translation.encode([normalize(text)])[0])


def texts_of(tokens: int, texts: Sequence[str], count: Callable[[str], int]) -> list[str]:
    """Return up to 64 texts of exactly ``tokens`` tokens, made of the words of ``texts`` in order."""
    words = [word for text in texts for word in text.split()]
    made: list[str] = []
    start = 0
    while start < len(words) and len(made) < _TEXTS_OF_A_LENGTH:
        # A word has at least one token, so ``tokens`` words are enough. Bisect for the longest run that is not too
        # long.
        run = list(itertools.islice(words, start, start + tokens))
        low, high = 0, len(run)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if count(" ".join(run[:middle])) <= tokens else (low, middle - 1)
        if low and count(" ".join(run[:low])) == tokens:
            made.append(" ".join(run[:low]))
        start += max(1, low)
    return made


def _longest(task: TaskFacts) -> int:
    return task.max_length if isinstance(task, Classification) else task.max_source_length


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("export", type=Path, nargs="?", default=ROOT / "demo/exports/sentiment")
    parser.add_argument(
        "--data", type=Path, default=ROOT / "demo/runs/sentiment/splits/test.jsonl", help="texts to ask"
    )
    parser.add_argument("--axes", nargs="+", choices=(*AXES, HOURS), default=AXES)
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--precision", default="auto")
    cpus = available_cpus()
    counts = sorted({*(2**i for i in range(cpus.bit_length())), cpus})
    parser.add_argument("--batches", nargs="+", type=int, default=[2**i for i in range(8)])
    parser.add_argument("--lengths", nargs="+", type=int, default=[8, 16, 32, 64, 128, 256, 512], help="in tokens")
    parser.add_argument("--thread-counts", nargs="+", type=int, default=counts)
    parser.add_argument("--instances", nargs="+", type=int, default=[1, 2, 4], help="behind the embedded Triton")
    parser.add_argument("--models", nargs="+", type=int, default=[1, 2, 4], help="of the server")
    parser.add_argument("--p99-limit", type=float, default=50.0, metavar="MS", help="that a served rate must hold")
    parser.add_argument("--hours", type=float, default=2.0, help="of load, if that axis is named")
    parser.add_argument("--windows", type=int, default=12, help="that they are measured in")
    parser.add_argument("--threads", type=int, default=cpus, help="while batch or length grow")
    parser.add_argument("--max-rows", type=int, default=480)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each measurement")
    parser.add_argument("--warmup", type=float, default=0.5, metavar="SECONDS", help="before each measurement")
    default = ROOT / "bench" / "results" / f"{datetime.date.today()}-scaling.json"
    parser.add_argument("--out", type=Path, default=default)
    return parser.parse_args()


if __name__ == "__main__":
    main()
