import numpy as np
import pytest

from deploykit.tasks.classification.metrics import regression_metrics


def test_metrics_equal_scipys_and_scikit_learns():
    stats = pytest.importorskip("scipy.stats")
    random = np.random.default_rng(0)
    truth = random.integers(0, 6, 200).astype(float)  # with ties
    answers = truth + random.normal(0, 1, 200).round(1)
    found = regression_metrics(truth, answers)
    assert found["mae"] == pytest.approx(np.abs(truth - answers).mean())
    assert found["rmse"] == pytest.approx(np.sqrt(((truth - answers) ** 2).mean()))
    assert found["pearson"] == pytest.approx(stats.pearsonr(truth, answers).statistic)
    assert found["spearman"] == pytest.approx(stats.spearmanr(truth, answers).statistic)


def test_a_constant_has_no_correlation():
    assert regression_metrics(np.array([1.0, 2.0]), np.array([3.0, 3.0]))["pearson"] == 0
