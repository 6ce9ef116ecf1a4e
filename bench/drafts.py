"""Compare a language model's export with and without a draft model, on prompts of a file, by turns.

Each prompt is answered without guesses, with prompt lookup, and with the draft too; the ratios are of the same prompt. Prints a
line for each temperature. CPU time is of one thread, so that other programs disturb it little.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

from deploykit.artifacts import load_manifest
from deploykit.runtime.engines import NATIVE_FILE
from deploykit.runtime.sampling import Sampling
from deploykit.tasks.text_generation.draft import Record
from deploykit.tasks.text_generation.draft_model import draft_weights
from deploykit.tasks.text_generation.generate import read_questions
from deploykit.tasks.text_generation.generator import LocalGenerator, as_prompt
from deploykit.tasks.text_generation.predictor import load_generator
from deploykit.tasks.text_generation.prompt_lookup import PromptLookup

_WAYS = ("without", "lookup", "draft")


class _Guesses:
    """Counts of the draft's guesses."""

    def __init__(self) -> None:
        self.guessed = self.right = 0
        learn = Record.learn

        def counted(record: Record, guessed: int, right: int) -> None:
            self.guessed += guessed
            self.right += right
            learn(record, guessed, right)

        Record.learn = counted  # type: ignore[method-assign]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("export", type=Path)
    parser.add_argument("draft", type=Path)
    parser.add_argument("rows", help="a file of prompts")
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--temperature", type=float, action="append")
    options = parser.parse_args()
    guesses = _Guesses()
    answer = _answerer(options.export, options.draft)
    texts = [question.prompt for question in read_questions(options.rows)][: options.prompts]
    for temperature in options.temperature or [0.0, 0.7, 1.0]:
        guesses.guessed = guesses.right = tokens = 0
        ratios: dict[str, list[float]] = {way: [] for way in _WAYS}
        for turn in range(options.rounds):
            for number, text in enumerate(texts):
                sampling = Sampling(max_new_tokens=options.tokens, temperature=temperature, seed=number)
                took, answers = {}, set()
                for way in _WAYS[turn % 3 :] + _WAYS[: turn % 3]:
                    start = time.thread_time()
                    ids = answer(way, text, sampling)
                    took[way] = time.thread_time() - start
                    answers.add(ids)
                assert len(answers) == 1, "guesses change no answer"
                tokens += len(ids)
                for way in _WAYS:
                    ratios[way].append(took["without"] / took[way])
        speeds = ", ".join(f"{way} {median(ratios[way]):.2f} x" for way in _WAYS[1:])
        share = guesses.right / max(guesses.guessed, 1)
        print(
            f"temperature {temperature:g}: {tokens} tokens, {speeds}; {guesses.guessed} guesses of the draft, {share:.0%} right",
            flush=True,
        )


def _answerer(export: Path, draft: Path) -> Callable[..., tuple[int, ...]]:
    """Return a function that answers a prompt in one of the ways, and returns the tokens."""
    task = load_manifest(export).task
    weights = {"draft": draft_weights(export, "native", draft)[0], "lookup": None}
    models: dict[str, LocalGenerator] = {
        way: load_generator(export, task, "native", NATIVE_FILE, 1, draft=file)  # type: ignore[arg-type]
        for way, file in weights.items()
    }
    guess = PromptLookup.guess

    def answer(way: str, text: str, sampling: Sampling) -> tuple[int, ...]:
        generator = models["lookup" if way == "without" else way]
        PromptLookup.guess = guess if way != "without" else lambda lookup, most: []  # type: ignore[method-assign]
        [[found]] = generator.reply([as_prompt(generator, text)], sampling)
        return found.ids  # type: ignore[union-attr]

    return answer


if __name__ == "__main__":
    main()
