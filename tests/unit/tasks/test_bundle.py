"""Comparison of a bundle's answers with the recorded ones."""

from __future__ import annotations

import dataclasses
import random
from dataclasses import asdict

import pytest
from sacrebleu.metrics.chrf import CHRF

from deploykit.jetson.boards import BOARDS
from deploykit.jetson.bundle import fitted
from deploykit.runtime.generation import Generation
from deploykit.tasks.classification.facts import Classification
from deploykit.tasks.registry import task_of
from deploykit.tasks.translation.bundle import chrf
from deploykit.tasks.translation.facts import Translation
from deploykit.tasks.translation.translated import Translated

TASK = Translation("en", "fr", "marian", 100, 32, 32, 0, (1,), 0)
LINES = [
    "Enregistrez le fichier avant de fermer la fen\u00eatre !",
    "Voulez-vous ouvrir 3 dossiers, {name} ? Oui, \u00e0 100 %.",
    "Rechercher",
    "\u041e\u0442\u043a\u0440\u044b\u0442\u044c",
    "a",
    "",
]


@pytest.mark.parametrize("seed", range(8))
def test_chrf_is_sacrebleus(seed: int) -> None:
    rng = random.Random(seed)
    references = [line for line in LINES for _ in range(rng.randint(0, 2))] or LINES
    hypotheses = ["".join(c for c in line if rng.random() > 0.2) for line in references]
    expected = CHRF().corpus_score(hypotheses, [references]).score
    assert chrf(hypotheses, references) == pytest.approx(expected, abs=1e-6)


def test_chrf_of_texts_that_are_empty() -> None:
    assert (chrf(["", ""], ["", ""]), chrf(["a"], [""]), chrf([""], ["a"])) == (100.0, 0.0, 0.0)


def answer(text: str, score: float) -> dict[str, object]:
    return asdict(Translated(text, score, 5, 8, "eos"))


@pytest.mark.parametrize(
    ("precision", "words_changed", "score_changed", "right"),
    [
        ("int8", 0, 0.0, True),
        ("int8", 1, 0.015, True),
        ("fp16", 0, 0.015, False),
        ("int8", 1, 0.5, False),
        ("int8", 12, 0.0, False),
        ("int8", 0, float("nan"), False),
    ],
)
def test_a_translators_answers_are_judged_by_texts_and_scores(
    precision: str, words_changed: int, score_changed: float, right: bool
) -> None:
    texts = [f"le fichier num\u00e9ro {i} est ouvert" for i in range(16)]
    found = [
        text.replace("ouvert", "ferm\u00e9 maintenant") if i < words_changed else text for i, text in enumerate(texts)
    ]
    verdict = (
        task_of(TASK)
        .bundle(TASK)
        .compare(
            [answer(text, -0.5 + score_changed) for text in found], [answer(text, -0.5) for text in texts], precision
        )
    )
    assert verdict.right is right, verdict.told
    assert f"({1 - words_changed / 16:.0%} equal)" in verdict.told


def test_scores_count_per_token_whatever_the_length_penalty() -> None:
    sums = dataclasses.replace(TASK, generation=Generation(length_penalty=0.0))
    verdict = task_of(sums).bundle(sums).compare([answer("a", -4.0)], [answer("a", -4.08)], "int8")  # of 8 tokens
    assert "differ by 1.00e-02" in verdict.told
    assert verdict.right


def test_a_small_board_has_caches_for_fewer_tokens() -> None:
    long = dataclasses.replace(
        TASK, max_source_length=1024, max_target_length=200, generation=Generation(max_length=1024)
    )
    small = fitted(long, BOARDS["orin-nano"])
    assert isinstance(small, Translation)
    assert (small.max_source_length, small.max_target_length, small.generation.max_length) == (256, 200, 200)
    assert fitted(small, BOARDS["thor"]) == small
    classifies = Classification(("a", "b"), 512, 0)
    assert fitted(classifies, BOARDS["orin-nano"]) == classifies, "it would answer otherwise"
