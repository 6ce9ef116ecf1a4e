"""How tokens are chosen: each rule as transformers has it, and its errors."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from deploykit.errors import UsageError
from deploykit.runtime.sampler import Sampler
from deploykit.runtime.sampling import Sampling, override
from deploykit.runtime.token_distribution import distribution, draw, top_tokens

LOGITS = np.random.default_rng(0).normal(0, 3, 200).astype(np.float32)


@pytest.mark.parametrize("size", [200, 20_000])
@pytest.mark.parametrize(
    "given",
    [
        {"temperature": 0.7},
        {"temperature": 1.3, "top_k": 5},
        {"temperature": 1.0, "top_p": 0.8},
        {"temperature": 1.0, "top_p": 0.999},
        {"temperature": 0.9, "min_p": 0.05},
        {"temperature": 1.0, "typical_p": 0.3},
        {"temperature": 1.2, "typical_p": 0.95},
        {"temperature": 1.5, "top_k": 50, "top_p": 0.9, "min_p": 0.02},
        {"temperature": 1.1, "top_k": 100, "top_p": 0.9, "min_p": 0.01, "typical_p": 0.8},
    ],
)
def test_the_distribution_is_that_of_transformers(given: dict[str, Any], size: int) -> None:
    warpers = LogitsProcessorList([TemperatureLogitsWarper(given["temperature"])])
    if "top_k" in given:
        warpers.append(TopKLogitsWarper(int(given["top_k"])))
    if "top_p" in given:
        warpers.append(TopPLogitsWarper(given["top_p"]))
    if "min_p" in given:
        warpers.append(MinPLogitsWarper(given["min_p"]))
    if "typical_p" in given:
        warpers.append(TypicalLogitsWarper(given["typical_p"]))
    logits = np.random.default_rng(size).normal(0, 3, size).astype(np.float32)
    expected = warpers(torch.zeros(1, 1, dtype=torch.long), torch.tensor(logits[None]).double()).softmax(-1)[0].numpy()
    kept, shares = distribution(logits, **given)
    found = np.zeros(size)
    found[kept] = shares / shares.sum(dtype=np.float64)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert set(kept) == set(np.flatnonzero(expected))


def test_processors_come_in_the_order_of_transformers() -> None:
    prompt, bias, ends = [3, 5, 5, 9], {3: 4.0, 17: -2.5, 9: -1.0}, [1, 2]
    processors = LogitsProcessorList([
        SequenceBiasLogitsProcessor([[[token], value] for token, value in bias.items()]),
        RepetitionPenaltyLogitsProcessor(1.7),
        MinNewTokensLengthLogitsProcessor(len(prompt), 4, torch.tensor(ends)),
    ])  # fmt: skip
    sampler = Sampler(
        override(Sampling(repetition_penalty=1.7, min_new_tokens=4), {"logit_bias": bias}), prompt, ends=ends
    )
    ids = list(prompt)
    for step in range(8):
        logits = np.random.default_rng(step).normal(0, 1, 200).astype(np.float32)
        logits[ends] = 9
        expected = processors(torch.tensor([ids]), torch.tensor(logits[None])).argmax().item()
        assert sampler.choose(logits) == expected
        assert (expected in ends) == (step >= 4)
        ids.append(expected)


def test_a_low_temperature_and_tokens_that_cannot_come_leave_the_rest() -> None:
    for temperature in (1e-300, 1e-3):
        kept, shares = distribution(LOGITS, temperature=temperature)
        assert (kept[shares.argmax()], shares.max()) == (LOGITS.argmax(), 1)
        assert shares.sum() == pytest.approx(1)
    logits = np.full(3000, -np.inf, np.float32)
    logits[[5, 7]] = 1
    for given in ({}, {"top_k": 3}, {"top_p": 0.9}, {"min_p": 0.1}, {"typical_p": 0.9}):
        kept, shares = distribution(logits, temperature=1.0, **given)  # type: ignore[arg-type]
        assert kept.tolist() == [5, 7]
        assert shares.tolist() == [1, 1]


def test_equal_probabilities_are_cut_by_id() -> None:
    kept, _ = distribution(np.zeros(5000, np.float32), temperature=1.0, top_p=0.5)
    assert kept.tolist() == list(range(2500))
    kept, _ = distribution(np.array([0, 1, 0, 0], np.float32), temperature=1.0, top_p=0.6)
    assert kept.tolist() == [0, 1]
    assert top_tokens(np.array([0, 1, 2, 1, 2], np.float32), 3).tolist() == [2, 4, 1]


@pytest.mark.parametrize("size", [1, 511, 512, 1025])
def test_each_share_is_drawn_as_often_as_it_is_large(size: int) -> None:
    shares = np.random.default_rng(0).random(size).astype(np.float32)
    shares[size // 3] = 0
    if size == 1:
        shares[:] = 1
    edges = np.cumsum(shares, dtype=np.float64) / shares.sum(dtype=np.float64)
    for place in np.flatnonzero(shares):
        middle = edges[place] - shares[place] / shares.sum(dtype=np.float64) / 2
        assert draw(shares, middle) == place
    assert draw(shares, np.nextafter(1, 0)) == size - 1


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
    kept, shares = distribution(LOGITS, temperature=1.0, top_k=3)
    sampler = Sampler(sampling, [1])
    drawn = [sampler.choose(LOGITS) for _ in range(3000)]
    found = np.array([drawn.count(token) / 3000 for token in kept])
    np.testing.assert_allclose(found, shares / shares.sum(), atol=0.03)
    again = Sampler(sampling, [1])
    assert [again.choose(LOGITS) for _ in range(50)] == drawn[:50]
    other = Sampler(sampling, [1], answer=1)
    assert [other.choose(LOGITS) for _ in range(50)] != drawn[:50]


@pytest.mark.parametrize(
    ("name", "value"),
    [("temperature", -1.0), ("top_k", 1.5), ("top_p", 0.0), ("n", 0), ("seed", -1), ("max_new_tokens", 0),
     ("max_tokens", 0), ("min_p", float("nan")), ("beams", 3), ("typical_p", 0), ("logprobs", 21), ("best_of", 0),
     ("logit_bias", {3: 101}), ("logit_bias", {"x": 1}), ("logit_bias", [3]), ("stop_token_ids", [-1]),
     ("stop_token_ids", "3"), ("ignore_eos", 1), ("stop", ("",)), ("stop", 3), ("stop", ["x"] * 2000),
     ("min_new_tokens", 257), ("choice", "a"), ("choice", [""]), ("regex", 3), ("json_schema", "x"),
     ("temperature", 10**400), ("n", 10**400), ("top_p", float("-inf")), ("logit_bias", {"9" * 5000: 1}),
     ("logit_bias", {"3": 10**400})],
)  # fmt: skip
def test_a_bad_option_is_named(name: str, value: Any) -> None:
    with pytest.raises(UsageError, match=name):
        override(Sampling(), {name: value})


def test_options_that_exclude_each_other_are_named() -> None:
    for given, told in (
        ({"regex": "a", "choice": ["a"]}, "regex and choice"),
        ({"max_tokens": 3, "max_new_tokens": 3}, "max_new_tokens is given twice"),
        ({"n": 3, "best_of": 2}, "best_of is 2, and n is 3"),
    ):
        with pytest.raises(UsageError, match=told):
            override(Sampling(), given)
    with pytest.raises(UsageError, match="logit_bias names token 200, and the model has 200"):
        override(Sampling(), {"logit_bias": {"200": 1}}).check_tokens(200)


def test_options_of_other_tools_and_of_json() -> None:
    assert override(Sampling(), {"max_tokens": 7, "min_tokens": 2}) == Sampling(max_new_tokens=7, min_new_tokens=2)
    assert override(Sampling(regex="a"), {"choice": ["a", "b"]}).regex is None, "a request's replaces the default"
    sampling = override(
        Sampling(), {"logit_bias": {"7": 1, 3: -2.5}, "stop": ["a"], "stop_token_ids": [4], "logprobs": 0}
    )
    assert Sampling.from_record(json.loads(json.dumps(dataclasses.asdict(sampling)))) == sampling
    earlier = {"max_new_tokens": 9, "temperature": 0.0, "stop": ["a"], "n": 1}
    assert Sampling.from_record(earlier) == Sampling(max_new_tokens=9, stop=("a",))


def test_the_parameters_of_a_request_make_the_sampling_again() -> None:
    default = Sampling(max_new_tokens=40, temperature=0.5)
    wanted = Sampling(
        logit_bias=((3, -1.5), (7, 100.0)),
        stop=("a", "b"),
        stop_token_ids=(2,),
        n=2,
        logprobs=1,
        choice=("x", "y"),
        seed=5,
    )
    sent = json.loads(json.dumps(wanted.parameters(default)))
    assert override(default, sent) == wanted
    assert default.parameters(default) == {}
