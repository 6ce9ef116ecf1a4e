"""When a draft model guesses, and how much."""

from __future__ import annotations

import itertools

from deploykit.tasks.text_generation.draft import Cost, Pace, Record


def test_guesses_rest_where_they_do_not_pay() -> None:
    good, bad = Record(), Record()
    lengths = []
    for _ in range(100):
        good.learn(4, 4)
        lengths.append(bad.tokens(6, Cost()))
        bad.learn(lengths[-1], 0)
    assert good.tokens(6, Cost()) == 6
    assert good.tokens(6, Cost(guess=1.0)) == 0, "a draft as slow as its target never pays"
    tried = [place for place, length in enumerate(lengths) if length]
    assert len(tried) < 20
    assert Record(0.1).tokens(6, Cost()) == 0
    assert max(b - a for a, b in itertools.pairwise(tried)) > 32, "it rests longer each time"


def test_costs_are_medians_by_the_number_of_rows() -> None:
    pace = Pace()
    assert pace.cost(1) == Cost()
    for what, seconds in (("guess", 1.0), ("check", 6.0), ("plain", 5.0)):
        for took in (seconds, seconds, 100 * seconds):
            pace.add(what, 1, took)
    assert pace.cost(1) == Cost(0.2, 1.2)
    assert pace.cost(2) == Cost()
