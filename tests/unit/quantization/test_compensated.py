"""Rounding that makes up for its own errors on real inputs."""

from __future__ import annotations

import numpy as np
import pytest

from deploykit.graphs.causal_lm import int4_levels
from deploykit.graphs.native_causal import nibble_levels
from deploykit.quantization.compensated import Fit, Rounding, compensated, factor, int8_levels

RANDOM = np.random.default_rng(0)


def correlated(rows: int, inputs: int) -> np.ndarray:
    return (RANDOM.normal(0, 1, (rows, inputs // 4)) @ RANDOM.normal(0, 1, (inputs // 4, inputs))).astype(np.float32)


@pytest.mark.parametrize(
    ("inputs", "block", "fit"),
    [(70, 70, int8_levels), *((n, 32, fit) for n in (96, 70) for fit in (int8_levels, int4_levels, nibble_levels))],
)
def test_errors_of_an_output_are_smaller_than_those_of_rounding_to_nearest(inputs: int, block: int, fit: Fit) -> None:
    x, weight = correlated(400, inputs), RANDOM.normal(0, 1, (inputs, 24)).astype(np.float32)
    weight[:, 3] = 0
    found = compensated(weight, factor(x.T @ x), block, fit)
    assert found.scales.shape == found.minimums.shape == (-(-inputs // block), 24)
    scales, minimums = (each.repeat(block, 0)[:inputs] for each in (found.scales, found.minimums))
    weights = found.values * scales + minimums
    assert np.abs(weights - weight).max() < 5 * scales.max(), "weights stay near"
    assert not weights[:, 3].any()
    least, most = (-127, 127) if fit is int8_levels else (0, 15)
    assert least <= found.values.min() <= found.values.max() <= most
    nearest = np.concatenate([_nearest(weight[i : i + block], fit) for i in range(0, inputs, block)])
    errors = [np.square(x @ (rounded - weight)).mean() for rounded in (weights, nearest)]
    assert errors[0] < 0.3 * errors[1]


def _nearest(block: np.ndarray, fit: Fit) -> np.ndarray:
    levels = fit(block)
    return levels.round(block) * levels.scale + levels.minimum


def test_inputs_that_are_never_used_change_nothing_and_nothing_is_divided_by_zero() -> None:
    x = correlated(50, 64)
    x[:, 5] = 0
    weight = RANDOM.normal(0, 1, (64, 8)).astype(np.float32)
    found = compensated(weight, factor(x.T @ x), 32, int8_levels)
    assert np.isfinite(found.scales).all()
    assert np.abs(found.values[5] * found.scales[0] - weight[5]).max() <= 5 * found.scales[0].max()


def test_a_layer_is_rounded_once_and_one_with_unknown_inputs_not_at_all() -> None:
    rounding = Rounding()
    weight = RANDOM.normal(0, 1, (32, 4)).astype(np.float32)
    assert rounding.rounded("a", weight, 32, int8_levels) is None
    rounding.learn({"a": np.eye(32, dtype=np.float32)})
    first = rounding.rounded("a", weight, 32, int8_levels)
    assert first is not None
    assert rounding.rounded("a", weight, 32, int8_levels) is first
    np.testing.assert_array_equal(first.values, np.rint(weight / first.scales))
    assert rounding.rounded("a", weight, 32, int4_levels) is not first
    assert rounding.rounded("b", weight, 32, int8_levels) is None
