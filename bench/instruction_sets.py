"""Compare the instruction sets of the engine ``native`` on this CPU: the same calls, in alternation, in one process.

Pass exports of any task on the command line. Calls alternate, so that other work of the machine affects all instruction
sets equally; the ratio of a round is that of neighbouring calls. All must give the same answers. Writes
bench/results/<date>-instruction-sets-<fastest>.json.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from suite import begin, say, write_record

import deploykit
from deploykit.hardware import available_cpus
from deploykit.runtime.engines.native import loader

ROOT = Path(__file__).parents[1]
WORDS = 300
"""Of a long text or prompt."""
Call = Callable[[deploykit.Model, int], Any]
"""Call a model in a round. Prompts begin with the round's number, because known prefixes are not computed again."""


def main() -> None:
    options = _options()
    suite = begin("instruction_sets.py", options.threads, {}, ())
    sets = (
        options.sets.split(",") if options.sets else [name for name in loader.instruction_sets() if name != loader.SLOW]
    )
    suite["reference"] = options.reference
    for export in options.exports:
        models = {name: _open(export, name, options.threads) for name in dict.fromkeys((*sets, options.reference))}
        rows = [json.loads(line) for line in (export / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
        for label, call in _calls([_text(row) for row in rows], generates="messages" in rows[0]):
            task = type(next(iter(models.values())).task).__name__
            record = {"task": task, "calls": label, **_compare(models, call, options.reference, options.seconds)}
            suite["workloads"].append(record)
            say(f"{task}, {label}: " + "; ".join(
                f"{name} {found['p50_ms']:.1f} ms, x{found['ratio']['median']:.2f}" for name, found in record["sets"].items()
            ))  # fmt: skip
    write_record(suite, options.out or ROOT / f"bench/results/{datetime.date.today()}-instruction-sets-{sets[0]}.json")


def _open(export: Path, name: str, threads: int) -> deploykit.Model:
    os.environ[loader.VARIABLE] = name
    return deploykit.load(export, engine="native", threads=threads)


def _text(row: dict[str, Any]) -> str:
    return str(row["messages"][0]["content"] if "messages" in row else row.get("text") or row["source"])


def _calls(texts: list[str], *, generates: bool) -> Iterator[tuple[str, Call]]:
    """Return descriptions of calls, and functions that make them."""
    words = " ".join(texts).split()
    long = [" ".join(words[i : i + WORDS]) for i in range(0, min(len(words), 8 * WORDS), WORDS)]
    if generates:
        yield f"prompt of {WORDS} words", lambda model, round_: model.predict([f"{round_} {long[0]}"], max_new_tokens=1)
        for n in (8, 1):
            yield (
                f"{n} x 32 tokens",
                lambda model, round_, n=n: model.predict(  # type: ignore[misc]
                    [f"{round_} {text}" for text in texts[:n]], max_new_tokens=32, ignore_eos=True
                ),
            )
    else:
        for some, label in (
            (texts[:64], "64 texts"),
            (long, f"{len(long)} texts of {WORDS} words"),
            (texts[:1], "1 text"),
        ):
            yield label, lambda model, _, some=some: model.predict(some)  # type: ignore[misc]


def _compare(models: dict[str, deploykit.Model], call: Call, reference: str, seconds: float) -> dict[str, Any]:
    """Return the milliseconds of each model's calls, and how many times faster than ``reference`` each is."""
    answers = {name: [answer.text for answer in call(model, -1)] for name, model in models.items()}
    if len({tuple(each) for each in answers.values()}) != 1:
        raise SystemExit(f"instruction sets give different answers: {answers}")
    took: dict[str, list[float]] = {name: [] for name in models}
    end = time.monotonic() + seconds
    while time.monotonic() < end or len(took[reference]) < 5:
        for name, model in models.items():
            start = time.perf_counter()
            call(model, len(took[name]))
            took[name].append((time.perf_counter() - start) * 1e3)
    return {
        "rounds": len(took[reference]),
        "sets": {
            name: {
                **_spread(times, "_ms"),
                "ratio": _spread([slow / fast for slow, fast in zip(took[reference], times, strict=True)]),
            }
            for name, times in took.items()
        },
    }


def _spread(values: list[float], unit: str = "") -> dict[str, float]:
    low, median, high = statistics.quantiles(values, n=4)
    return {
        f"best{unit}" if unit else "best": round(min(values) if unit else max(values), 3),
        f"p25{unit}": round(low, 3),
        f"p50{unit}" if unit else "median": round(median, 3),
        f"p75{unit}": round(high, 3),
    }


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("exports", nargs="+", type=Path, metavar="EXPORT", help="a folder that `export --int8` wrote")
    parser.add_argument("--sets", help="instruction sets, with commas; default: all of this CPU but the plain C one")
    parser.add_argument(
        "--reference", default="avx2", help="instruction set that the others are compared with (default: avx2)"
    )
    parser.add_argument("--threads", type=int, default=available_cpus())
    parser.add_argument("--seconds", type=float, default=20, help="for each kind of call (default: 20)")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    for name in (*(options.sets or "").split(","), options.reference):
        if name and name not in loader.instruction_sets():
            parser.error(f"{name} does not run here; choose from {', '.join(loader.instruction_sets())}")
    return options


if __name__ == "__main__":
    main()
