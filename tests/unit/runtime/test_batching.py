from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploykit.runtime.batching import batches, bucket, padded_types
from deploykit.text import normalize


@given(st.text(st.characters(exclude_categories=())))
def test_normalized_text_is_encodable_and_stays_as_it_is(text: str) -> None:
    once = normalize(text)
    once.encode("utf-8")
    assert "\x00" not in once
    assert normalize(once) == once


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("  plain\t ", "plain"),
        ("a\x00b", "a b"),
        ("\ud800 lone", "� lone"),
        ("e\u0301", "é"),
        ("我爱你 🎉", "我爱你 🎉"),
        ("مرحبا", "مرحبا"),
        ("two\nlines", "two\nlines"),
    ],
)
def test_normalize(text: str, expected: str) -> None:
    assert normalize(text) == expected


@given(st.lists(st.integers(1, 300), max_size=200), st.integers(16, 4096))
def test_batches_hold_every_row_once_within_the_budget(lengths: list[int], budget: int) -> None:
    rows: list[int] = []
    for batch in batches([[7] * n for n in lengths], 0, max_length=300, token_budget=budget):
        assert batch.input_ids.size <= budget or len(batch.rows) == 1
        assert batch.attention_mask.sum(axis=1).tolist() == [lengths[r] for r in batch.rows]
        assert (batch.input_ids == 7 * batch.attention_mask).all()
        rows += batch.rows.tolist()
    assert sorted(rows) == list(range(len(lengths)))


@given(st.lists(st.integers(1, 300), max_size=200), st.integers(16, 4096))
def test_texts_of_all_lengths_share_batches_without_buckets(lengths: list[int], budget: int) -> None:
    rows: list[int] = []
    tokens: list[int] = []
    for batch in batches([[7] * n for n in lengths], 0, max_length=300, token_budget=budget, buckets=False):
        own = [lengths[r] for r in batch.rows]
        assert batch.attention_mask.sum(axis=1).tolist() == own
        assert (batch.input_ids == 7 * batch.attention_mask).all()
        assert batch.input_ids.shape[1] == max(own)
        assert sum(own) <= budget or len(own) == 1
        assert not tokens or tokens[-1] + own[0] > budget, "no batch is closed early"
        rows += batch.rows.tolist()
        tokens.append(sum(own))
    assert sorted(rows) == list(range(len(lengths)))


@given(st.integers(1, 600), st.lists(st.integers(1, 600), max_size=40))
def test_a_texts_padded_length_does_not_depend_on_its_batch_mates(length: int, others: list[int]) -> None:
    def padded(lengths: list[int]) -> int:
        for batch in batches([[1] * n for n in lengths], 0, max_length=600):
            if 0 in batch.rows:
                return batch.input_ids.shape[1]
        raise AssertionError

    assert padded([length]) == padded([length, *others]) == min(bucket(length), 600)


def test_padding_stands_before_the_tokens_where_that_is_asked_for() -> None:
    (batch,) = batches([[5, 6], [7, 8, 9]], 1, max_length=4, pad_left=True)
    assert batch.input_ids.tolist() == [[1, 1, 5, 6], [1, 7, 8, 9]]
    assert batch.attention_mask.tolist() == [[0, 0, 1, 1], [0, 1, 1, 1]]
    types = padded_types(batch.input_ids, [[0, 2], [0, 1, 2]], batch.rows, pad_left=True)
    assert types.tolist() == [[0, 0, 0, 2], [0, 0, 1, 2]]


def test_the_runtime_imports_neither_torch_nor_transformers() -> None:
    program = (
        "import sys, deploykit.tasks.opening, deploykit.tasks.classification.metrics, deploykit.runtime.engines.onnxruntime\n"
        "import deploykit.runtime.engines.openvino, deploykit.runtime.engines.tensorrt, deploykit.runtime.served\n"
        "print([m for m in ('torch', 'transformers', 'datasets', 'onnx', 'tensorrt_rtx') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_numpy_scores_keep_the_order_of_rows() -> None:
    lengths = np.random.default_rng(0).integers(1, 100, 64)
    seen = np.full(64, -1)
    for batch in batches([[int(n)] * int(n) for n in lengths], 0, max_length=128):
        seen[batch.rows] = batch.input_ids[:, 0]
    assert (seen == lengths).all()
