"""Logits change by bias and penalties in place, in the library as in numpy, and change back to the bit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from deploykit.runtime import penalties
from deploykit.runtime.engines.native import loader
from deploykit.runtime.penalties import Penalties
from deploykit.runtime.sampler import Sampler
from deploykit.runtime.sampling import Sampling

ALL = Sampling(
    repetition_penalty=1.3,
    presence_penalty=0.7,
    frequency_penalty=0.11,
    logit_bias=((3, 4.0), (5, -1.7), (4999, 0.1)),
)
EACH = (
    Sampling(repetition_penalty=0.77),
    Sampling(presence_penalty=-0.3),
    Sampling(frequency_penalty=0.2),
    Sampling(logit_bias=((0, -100.0), (17, 100.0))),
    ALL,
)


@pytest.fixture(params=["native", "numpy"])
def code(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "numpy":
        monkeypatch.setattr(penalties, "native_penalties", lambda: None)
    elif loader.lacks() is not None:
        pytest.skip(f"the engine native does not run here: {loader.lacks()}")


def logits_of(number: int) -> np.ndarray:
    random = np.random.default_rng(number)
    logits = random.normal(0, 5, 5000).astype(np.float32)
    logits[random.integers(0, 5000, 50)] = 0.0
    logits[random.integers(0, 5000, 50)] = -np.inf
    return logits


def expected(sampling: Sampling, prompt: Sequence[int], answer: Sequence[int], logits: np.ndarray) -> np.ndarray:
    """Compute the documented rules token by token."""
    found, one = logits.copy(), np.float32
    for token, bias in sampling.logit_bias:
        found[token] += one(bias)
    for token in {*prompt, *answer} if sampling.repetition_penalty != 1 else ():
        penalty = one(sampling.repetition_penalty)
        found[token] = found[token] * penalty if found[token] < 0 else found[token] / penalty
    for token in set(answer):
        found[token] -= one(sampling.presence_penalty) + one(sampling.frequency_penalty) * one(answer.count(token))
    return found


@pytest.mark.parametrize("sampling", EACH)
def test_logits_are_those_of_the_rules_to_the_bit_and_change_back(code: None, sampling: Sampling) -> None:
    random = np.random.default_rng(0)
    prompt = random.integers(0, 5000, 100).tolist()
    answer: list[int] = []
    changes = Penalties(sampling, [3, 5, 5, *prompt])
    for step in range(200):
        logits = logits_of(step % 7)
        before = logits.tobytes()
        changes.apply(logits)
        right = expected(sampling, [3, 5, 5, *prompt], answer, np.frombuffer(before, np.float32))
        assert logits.tobytes() == right.tobytes(), step
        changes.undo(logits)
        assert logits.tobytes() == before
        token = int(random.choice([3, 4999, *prompt[:20], random.integers(0, 5000)]))
        answer.append(token)
        changes.add(token)


def test_a_copy_goes_on_by_itself(code: None) -> None:
    changes = Penalties(ALL, [1, 2])
    for token in range(64):  # the next one needs more room
        changes.add(token)
    other = changes.copy()
    changes.add(4000)
    other.add(4001)
    for each, last in ((changes, 4000), (other, 4001)):
        logits = logits_of(1)
        each.apply(logits)
        assert logits.tobytes() == expected(ALL, [1, 2], [*range(64), last], logits_of(1)).tobytes()


def test_a_token_outside_of_the_vocabulary_is_an_error(code: None) -> None:
    for sampling, prompt in ((Sampling(logit_bias=((10, 1.0),)), [1]), (Sampling(repetition_penalty=2), [10])):
        logits = np.ones(10, np.float32)
        with pytest.raises(IndexError, match="token 10 is not among 10 logits"):
            Penalties(sampling, prompt).apply(logits)
        assert (logits == 1).all()


@pytest.mark.parametrize("given", [{}, {"temperature": 0.9, "top_p": 0.8}, {"min_new_tokens": 50}])
def test_a_sampler_leaves_the_logits_as_they_are(code: None, given: dict[str, Any]) -> None:
    sampling = Sampling(**{**ALL.__dict__, **given})
    fixed, own = Sampler(sampling, [1, 2, 3], ends=[7]), Sampler(sampling, [1, 2, 3], ends=[7])
    for step in range(100):
        logits = logits_of(step % 5)
        read_only = logits.copy()
        read_only.flags.writeable = False
        ahead = own.ahead()
        assert own.choose(logits) == ahead.choose(logits) == fixed.choose(read_only)
        assert logits.tobytes() == read_only.tobytes()


@pytest.mark.skipif(loader.lacks() is not None, reason="the engine native does not run here")
def test_instruction_sets_choose_the_same_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {}
    for name in loader.instruction_sets():
        monkeypatch.setenv(loader.VARIABLE, name)
        loader.open_library()
        sampler = Sampler(Sampling(**{**ALL.__dict__, "temperature": 0.7, "top_k": 40}), [1, 2, 3])
        found[name] = [sampler.choose(logits_of(step)) for step in range(60)]
    monkeypatch.undo()
    loader.open_library()
    assert all(tokens == found[loader.SLOW] for tokens in found.values())
