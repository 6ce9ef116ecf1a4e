from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploykit.data.grouping import group_key
from deploykit.errors import DataError, UsageError
from deploykit.tasks.classification.rows import Example
from deploykit.tasks.classification.split import Splits, drop_leaks, split

words = st.text(st.sampled_from("abcXY 今é@#!🎉."), min_size=1, max_size=6)
examples = st.lists(
    st.builds(Example, words, st.sampled_from(["x", "y", "z", "x|y", ""]), st.just("o:1")), min_size=1, max_size=60
)
fractions = st.sampled_from([0, 0.1, 0.3, 0.45])


def make(**counts):
    return [Example(f"{label} text {i}", label, f"f:{i}") for label, n in counts.items() for i in range(n)]


def parts(splits: Splits) -> list[tuple[Example, ...]]:
    return [splits.train, splits.validation, splits.test]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("RT @bob: Nice car!!", "nice car"),
        ("Nice car http://t.co/a", "nice car https://t.co/b www.x.y"),
        ("@a @b nice   CAR #", "nice car"),
        ("今天,天气", "今天天气!"),
        ("مرحبا، بالعالم", "مرحبا بالعالم"),
        ("STRASSE", "straße"),
        ("cafe\u0301", "café"),
    ],
)
def test_near_duplicates_share_a_group(one, other):
    assert group_key(one) == group_key(other) != ""


@pytest.mark.parametrize(
    ("one", "other"), [("🎉", "😡"), ("!", "?"), ("@a", "@b"), ("今天", "明天"), ("room 1", "room 2")]
)
def test_different_texts_do_not_collapse(one, other):
    assert group_key(one) != group_key(other)


def test_fractions_and_label_shares_hold():
    splits = split(make(a=800, b=200), validation=0.1, test=0.2, seed=1)
    assert [Counter(e.label for e in part) for part in parts(splits)] == [
        {"a": 560, "b": 140},
        {"a": 80, "b": 20},
        {"a": 160, "b": 40},
    ]


def test_label_of_three_groups_is_in_every_split_and_rarer_ones_in_training():
    splits = split(make(a=100, b=3, c=2, d=1), validation=0.1, test=0.1, seed=0)
    train, validation, test = ({e.label for e in part} for part in parts(splits))
    assert train == {"a", "b", "c", "d"}
    assert {"a", "b"} <= validation & test


def test_small_data_still_fills_every_split():
    assert all(parts(split(make(a=2, b=2), validation=0.1, test=0.1, seed=0)))


def test_unique_label_combinations_still_split():
    rows = [Example(f"t{i}", f"a{i % 5}|b{i % 7}", "o") for i in range(35)]
    splits = split(rows, validation=0.2, test=0.2, seed=0)
    for part in parts(splits):
        assert {name for e in part for name in e.label.split("|")} == {f"a{i}" for i in range(5)} | {
            f"b{i}" for i in range(7)
        }
    with pytest.raises(DataError, match="too few"):
        split(rows, validation=0.2, test=0.2, seed=0, multi_label=False)


@pytest.mark.parametrize("rows", [[], make(a=1, b=1), make(a=2), make(a=1) * 50])
def test_too_few_rows_are_refused_with_a_remedy(rows):
    with pytest.raises(DataError, match=r"are too few for training and validation and test\n.*--validation and --test"):
        split(rows, validation=0.1, test=0.1, seed=0)


@pytest.mark.parametrize(("validation", "test"), [(0.5, 0.5), (1, 0), (-0.1, 0.1)])
def test_fractions_that_leave_no_training_rows_are_a_usage_error(validation, test):
    with pytest.raises(UsageError):
        split(make(a=10), validation=validation, test=test, seed=0)


def test_seed_and_nothing_else_draws_the_split():
    rows = make(a=50, b=50)
    first = split(rows, validation=0.1, test=0.1, seed=3)
    assert split(rows[::-1], validation=0.1, test=0.1, seed=3) == first
    assert split(rows, validation=0.1, test=0.1, seed=4) != first


@given(examples, fractions, fractions, st.integers(0, 3), st.booleans())
def test_splits_hold_every_row_once_and_no_text_twice(rows, validation, test, seed, multi_label):
    try:
        splits = split(rows, validation=validation, test=test, seed=seed, multi_label=multi_label)
    except DataError:
        return
    assert Counter(e for part in parts(splits) for e in part) == Counter(rows)
    keys = [{group_key(e.text) for e in part} for part in parts(splits)]
    assert sum(map(len, keys)) == len(set.union(*keys))
    assert splits.train
    assert bool(splits.validation) == bool(validation)
    assert bool(splits.test) == bool(test)
    names = [{n for e in part for n in (e.label.split("|") if multi_label else [e.label])} for part in parts(splits)]
    assert names[1] | names[2] <= names[0]


@given(st.lists(st.sampled_from("xyz"), min_size=1, max_size=60), st.integers(0, 3))
def test_every_label_of_three_distinct_texts_is_in_every_split(labels, seed):
    rows = [Example(f"text {i}", label, "o") for i, label in enumerate(labels)]
    common = {label for label, n in Counter(labels).items() if n >= 3}
    if common:
        for part in parts(split(rows, validation=0.1, test=0.1, seed=seed)):
            assert common <= {e.label for e in part}


def test_leaks_are_dropped_from_training_by_near_duplicate():
    train = [Example("RT @a: Hello!", "x", "t:1"), Example("other", "y", "t:2")]
    assert drop_leaks(train, [Example("hello", "x", "v:1")]) == ([train[1]], 1)
    assert drop_leaks(train, []) == (train, 0)
