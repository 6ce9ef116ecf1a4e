"""Tokens drawn by the library are those that Python's rules draw, on every instruction set."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from deploykit.runtime.engines.native import loader
from deploykit.runtime.engines.native.sampling import Draw, native_draw
from deploykit.runtime.finite import NoNumberError
from deploykit.runtime.sampler import Sampler
from deploykit.runtime.sampling import Sampling
from deploykit.runtime.token_distribution import distribution

if loader.lacks() is not None:
    pytest.skip(f"the engine native does not run here: {loader.lacks()}", allow_module_level=True)

NEAR = 1e-4
"""Of a boundary between two tokens: the library's exponential has an error of 4e-6."""


@pytest.fixture
def draw() -> Draw:
    found = native_draw()
    assert found is not None
    return found


@pytest.fixture(params=loader.instruction_sets())
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv(loader.VARIABLE, request.param)
    loader.open_library()
    yield request.param
    monkeypatch.undo()
    loader.open_library()


def case(number: int) -> tuple[np.ndarray, dict[str, float], float]:
    """Return logits, rules and a random number. Some logits are equal, and some tokens cannot come."""
    random = np.random.default_rng(number)
    size = int(random.choice([1, 2, 15, 257, 1000, 5000, 49_152]))
    logits = random.normal(0, random.choice([0.01, 1, 4]), size).astype(np.float32)
    if number % 3 == 0:
        logits = np.round(logits * 2) / 2
    logits[random.random(size) < random.choice([0, 0.2, 0.99])] = -np.inf
    logits[random.integers(size)] = 1
    rules = {
        "temperature": float(random.choice([0.3, 1, 1.7])),
        "top_k": int(random.choice([0, 1, 3, 40, 2000])),
        "top_p": float(random.choice([1, 1, 0.1, 0.9, 0.999])),
        "min_p": float(random.choice([0, 0, 0.05, 1])),
        "typical_p": float(random.choice([1, 1, 0.2, 0.95])),
    }
    return logits, rules, float(random.random())


def test_the_tokens_are_those_of_the_rules(isa: str, draw: Draw) -> None:
    at_a_boundary = 0
    for number in range(300):
        logits, rules, uniform = case(number)
        kept, shares = distribution(logits, **rules)
        edges = np.append(0, np.cumsum(shares, dtype=np.float64))
        edges /= edges[-1]
        token = draw(logits, *rules.values(), uniform)
        [place] = np.flatnonzero(kept == token)
        assert edges[place] - NEAR <= uniform < edges[place + 1] + NEAR, (number, rules)
        at_a_boundary += not edges[place] <= uniform < edges[place + 1]
    assert at_a_boundary < 10


def test_instruction_sets_draw_the_same_tokens(draw: Draw, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {}
    for name in loader.instruction_sets():
        monkeypatch.setenv(loader.VARIABLE, name)
        loader.open_library()
        found[name] = [draw(logits, *rules.values(), uniform) for logits, rules, uniform in map(case, range(500))]
    monkeypatch.undo()
    loader.open_library()
    assert all(tokens == found[loader.SLOW] for tokens in found.values())


def test_logits_that_are_not_finite_are_refused(draw: Draw) -> None:
    for value in (np.nan, -np.inf, np.inf):
        logits = np.full(700, value, np.float32)
        for rules in (
            (0, 1.0, 0.0, 1.0),
            (5, 1.0, 0.0, 1.0),
            (0, 0.5, 0.0, 0.9),
            (300, 0.9, 0.1, 0.5),
            (0, 1.0, 0.0, 0.5),
        ):
            assert draw(logits, 1.0, *rules, 0.5) == -1
        with pytest.raises(NoNumberError):
            Sampler(Sampling(temperature=1.0), [1]).choose(logits)
    logits = np.random.default_rng(0).normal(0, 1, 700).astype(np.float32)
    logits[::3] = np.nan
    for number in range(50):
        for typical_p in (1.0, 0.5):
            assert draw(logits, 1.0, number, 0.9, 0.01, typical_p, number / 50) < 700
