"""How tokens are chosen: each rule as transformers has it, and its errors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from deploykit.errors import UsageError
from deploykit.runtime.sampling import Sampler, Sampling, distribution, override

LOGITS = np.random.default_rng(0).normal(0, 3, 200).astype(np.float32)


@pytest.mark.parametrize(
    "given",
    [
        {"temperature": 0.7},
        {"temperature": 1.3, "top_k": 5},
        {"temperature": 1.0, "top_p": 0.8},
        {"temperature": 0.9, "min_p": 0.05},
        {"temperature": 1.5, "top_k": 50, "top_p": 0.9, "min_p": 0.02},
    ],
)
def test_the_distribution_is_that_of_transformers(given: dict[str, float]) -> None:
    warpers = LogitsProcessorList([TemperatureLogitsWarper(given["temperature"])])
    if "top_k" in given:
        warpers.append(TopKLogitsWarper(int(given["top_k"])))
    if "top_p" in given:
        warpers.append(TopPLogitsWarper(given["top_p"]))
    if "min_p" in given:
        warpers.append(MinPLogitsWarper(given["min_p"]))
    expected = warpers(torch.zeros(1, 1, dtype=torch.long), torch.tensor(LOGITS[None]).double()).softmax(-1)[0].numpy()
    kept, probabilities = distribution(LOGITS, override(Sampling(), given))
    found = np.zeros(len(LOGITS))
    found[kept] = probabilities
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert set(kept) == set(np.flatnonzero(expected))


def test_the_repetition_penalty_is_that_of_transformers() -> None:
    prompt = [3, 5, 5, int(LOGITS.argmax())]
    penalty = RepetitionPenaltyLogitsProcessor(1.7)
    expected = penalty(torch.tensor([prompt]), torch.tensor(LOGITS[None])).argmax().item()
    assert Sampler(Sampling(repetition_penalty=1.7), prompt).choose(LOGITS) == expected != prompt[-1]


def test_presence_and_frequency_penalties_are_of_the_answer() -> None:
    logits = np.array([1.0, 0.9, 0.0], np.float32)
    once = Sampler(Sampling(presence_penalty=0.5), [0])
    assert [once.choose(logits) for _ in range(3)] == [0, 1, 0]
    often = Sampler(Sampling(frequency_penalty=0.3), [0])
    assert [often.choose(logits) for _ in range(5)] == [0, 1, 0, 1, 0]


def test_samples_follow_the_distribution_and_the_seed() -> None:
    sampling = Sampling(temperature=1.0, top_k=3, seed=7)
    kept, probabilities = distribution(LOGITS, sampling)
    sampler = Sampler(sampling, [1])
    drawn = [sampler.choose(LOGITS) for _ in range(3000)]
    shares = np.array([drawn.count(token) / 3000 for token in kept])
    np.testing.assert_allclose(shares, probabilities, atol=0.03)
    again = Sampler(sampling, [1])
    assert [again.choose(LOGITS) for _ in range(50)] == drawn[:50]
    other = Sampler(sampling, [1], answer=1)
    assert [other.choose(LOGITS) for _ in range(50)] != drawn[:50]


@pytest.mark.parametrize(
    ("name", "value"),
    [("temperature", -1.0), ("top_k", 1.5), ("top_p", 0.0), ("n", 0), ("seed", -1), ("max_new_tokens", 0),
     ("min_p", float("nan")), ("beams", 3)],
)  # fmt: skip
def test_a_bad_option_is_named(name: str, value: float) -> None:
    with pytest.raises(UsageError, match=name):
        override(Sampling(), {name: value})
    with pytest.raises(UsageError, match="stop"):
        override(Sampling(), {"stop": ("",)})
