"""Compare a language model's export on ``native`` with and without guesses of the next tokens, by turns.

Prompts come from a file, or from ``--data``: a command after five examples (nl2bash, up to the end of the line), and a question about
a text (XQuAD), to be answered and to be answered by a quotation. Each prompt is answered without guesses, with prompt lookup, and
with ``--draft`` also with a draft model. The engine keeps the prompt, so the time is that of the answer's tokens after the first. It is
the CPU time of one thread, which other programs change little. Writes bench/results/<date>-guesses-<instruction set>.json.
"""

from __future__ import annotations

import argparse
import datetime
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from suite import begin, say, write_record

from deploykit.artifacts import load_manifest
from deploykit.bench.run import spread
from deploykit.data.sample import evenly
from deploykit.runtime.engines import NATIVE_FILE
from deploykit.runtime.engines.native import loader
from deploykit.runtime.sampling import Sampling
from deploykit.tasks.question_answering.rows import read_rows
from deploykit.tasks.text_generation.draft import Record
from deploykit.tasks.text_generation.draft_model import draft_weights
from deploykit.tasks.text_generation.facts import TextGeneration
from deploykit.tasks.text_generation.generate import read_questions
from deploykit.tasks.text_generation.generator import LocalGenerator
from deploykit.tasks.text_generation.predictor import load_generator
from deploykit.tasks.text_generation.prompt_lookup import PromptLookup

ROOT = Path(__file__).parents[1]
EXAMPLES = 5
WITHOUT, LOOKUP, DRAFT = "without", "lookup", "draft"
Prompt = str | list[dict[str, str]]
Answer = Callable[[str, Prompt, Sampling], tuple[int, ...]]
"""Answers a prompt in one of the ways."""


def main() -> None:
    options = _options()
    suite = begin("guesses.py", 1, {}, ())
    counts = _Counts()
    answer, ways = _answerer(options.export, options.draft)
    for title, (prompts, stop) in _prompts(options).items():
        for temperature in options.temperature or [0.0]:
            counts.guessed = counts.right = 0
            found = _measure(answer, ways, prompts, stop, temperature, options)
            found |= {
                "prompts": title,
                "temperature": temperature,
                "drafted": counts.guessed,
                "drafted_right": counts.right,
            }
            suite["workloads"].append(found)
            speeds = ", ".join(f"{way} {found['ratios'][way]['median']:.2f} x" for way in ways[1:])
            say(f"{title}, temperature {temperature:g}: {found['tokens']} tokens, {speeds}")
    out = f"{datetime.date.today()}-guesses-{loader.instruction_set()}.json"
    write_record(suite, options.out or ROOT / "bench/results" / out)


class _Counts:
    """Counts of the draft's guesses."""

    def __init__(self) -> None:
        self.guessed = self.right = 0
        learn = Record.learn

        def counted(record: Record, guessed: int, right: int) -> None:
            self.guessed += guessed
            self.right += right
            learn(record, guessed, right)

        Record.learn = counted  # type: ignore[method-assign]


def _prompts(options: argparse.Namespace) -> dict[str, tuple[list[Prompt], tuple[str, ...]]]:
    """Return prompts by title, and the texts that end an answer. A text is continued; messages are answered."""
    if options.rows:
        texts = [question.prompt for question in read_questions(options.rows)]
        return {options.rows: ([_message(text) for text in texts][: options.prompts], ())}
    asked, commands = (
        (options.data / f"nl2bash.{kind}").read_text(encoding="utf-8").splitlines() for kind in ("nl", "cm")
    )
    shots = [
        "".join(f"# {asked[i]}\n$ {commands[i]}\n\n" for i in range(first, first + EXAMPLES))
        + f"# {asked[first + EXAMPLES]}\n$"
        for first in evenly(range(len(asked) - EXAMPLES), options.prompts)
    ]
    rows = evenly(list(read_rows(str(options.data / "xquad.en.json"))), options.prompts)
    quoted = [f"{row.context}\n\nQuote the sentence of this text that answers: {row.question}" for row in rows]
    return {
        f"a command after {EXAMPLES} examples": (list(shots), ("\n",)),
        "an answer from a text": ([_message(f"{row.context}\n\n{row.question}") for row in rows], ()),
        "a quotation from a text": ([_message(text) for text in quoted], ()),
    }


def _message(text: str) -> Prompt:
    return [{"role": "user", "content": text}]


def _measure(
    answer: Answer, ways: Sequence[str], prompts: Sequence[Prompt], stop: tuple[str, ...], temperature: float,
    options: argparse.Namespace,
) -> dict[str, Any]:  # fmt: skip
    """Return how many times faster than without guesses each way is: for each round, of all prompts together."""
    seconds = {way: [0.0] * options.rounds for way in ways}
    tokens = 0
    for number, prompt in enumerate(prompts):
        first = Sampling(max_new_tokens=1, temperature=temperature, seed=number)
        whole = Sampling(max_new_tokens=options.tokens, temperature=temperature, seed=number, stop=stop)
        answers = set()
        for way in ways:
            answer(way, prompt, first)  # so that the engine keeps the prompt
        for turn in range(options.rounds):
            for way in [*ways[turn % len(ways) :], *ways[: turn % len(ways)]]:
                start = time.thread_time()
                answer(way, prompt, first)
                middle = time.thread_time()
                answers.add(answer(way, prompt, whole))
                seconds[way][turn] += (time.thread_time() - middle) - (middle - start)
        (ids,) = answers  # guesses change no answer
        tokens += len(ids) - 1
    return {
        "texts": len(prompts),
        "tokens": tokens,
        "ms_per_token": {way: spread([1e3 * s / tokens for s in seconds[way]]) for way in ways},
        "ratios": {way: spread([a / b for a, b in zip(seconds[WITHOUT], seconds[way], strict=True)]) for way in ways},
    }


def _answerer(export: Path, draft: Path | None) -> tuple[Answer, list[str]]:
    task = load_manifest(export, "export").task
    assert isinstance(task, TextGeneration)
    models: dict[str, LocalGenerator] = {LOOKUP: load_generator(export, task, "native", NATIVE_FILE, 1)}
    if draft is not None:
        weights = draft_weights(export, "native", draft)[0]
        models[DRAFT] = load_generator(export, task, "native", NATIVE_FILE, 1, draft=weights)
    guess = PromptLookup.guess

    def answer(way: str, prompt: Prompt, sampling: Sampling) -> tuple[int, ...]:
        generator = models[LOOKUP if way == WITHOUT else way]
        PromptLookup.guess = guess if way != WITHOUT else lambda lookup, most: []  # type: ignore[method-assign]
        [[found]] = generator.reply([prompt], sampling)
        return found.ids  # type: ignore[union-attr]

    return answer, [WITHOUT, *models]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("export", type=Path)
    parser.add_argument("rows", nargs="?", help="a file of prompts (default: those of --data)")
    parser.add_argument("--draft", type=Path, help="the export of a draft model")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared/data", help="folder of nl2bash and XQuAD")
    parser.add_argument("--prompts", type=int, default=20, help="of each kind (default: 20)")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--temperature", type=float, action="append", help="default: 0")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
