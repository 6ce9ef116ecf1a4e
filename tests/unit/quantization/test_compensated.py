"""Rounding that makes up for its own errors on real inputs."""

from __future__ import annotations

import numpy as np
import pytest

from deploykit.quantization.compensated import Rounding, compensated, factor

RANDOM = np.random.default_rng(0)


def correlated(rows: int, inputs: int) -> np.ndarray:
    return (RANDOM.normal(0, 1, (rows, inputs // 4)) @ RANDOM.normal(0, 1, (inputs // 4, inputs))).astype(np.float32)


@pytest.mark.parametrize(("inputs", "block"), [(96, 32), (70, 32), (70, 70)])
def test_errors_of_an_output_are_smaller_than_those_of_rounding_to_nearest(inputs: int, block: int) -> None:
    x, weight = correlated(400, inputs), RANDOM.normal(0, 1, (inputs, 24)).astype(np.float32)
    weight[:, 3] = 0
    values, scales = compensated(weight, factor(x.T @ x), block)
    assert scales.shape == (-(-inputs // block), 24)
    each = scales.repeat(block, 0)[:inputs]
    assert np.abs(values * each - weight).max() < 5 * each.max(), "weights stay near"
    assert not values[:, 3].any()
    nearest = np.clip(np.rint(weight / each), -127, 127) * each
    errors = [np.square(x @ (rounded - weight)).mean() for rounded in (values * each, nearest)]
    assert errors[0] < 0.3 * errors[1]


def test_inputs_that_are_never_used_change_nothing_and_nothing_is_divided_by_zero() -> None:
    x = correlated(50, 64)
    x[:, 5] = 0
    weight = RANDOM.normal(0, 1, (64, 8)).astype(np.float32)
    values, scales = compensated(weight, factor(x.T @ x), 32)
    assert np.isfinite(scales).all()
    assert np.abs(values[5] * scales[0] - weight[5]).max() <= 5 * scales[0].max()


def test_a_layer_is_rounded_once_and_one_with_unknown_inputs_not_at_all() -> None:
    rounding = Rounding()
    weight = RANDOM.normal(0, 1, (32, 4)).astype(np.float32)
    assert rounding.rounded("a", weight, 32) is None
    rounding.learn({"a": np.eye(32, dtype=np.float32)})
    first = rounding.rounded("a", weight, 32)
    assert first is not None
    assert rounding.rounded("a", weight, 32) is first
    np.testing.assert_array_equal(first[0], np.rint(weight / first[1]))
    assert rounding.rounded("b", weight, 32) is None
