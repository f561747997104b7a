"""Reliability tables, calibration error and entropy against worked examples and brute force."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from exlm_dist.evaluation.calibration import Reliability, entropy


def test_a_worked_example():
    """Five predictions, two bins: in (0, 0.5] probabilities 0.2 and 0.4 with one right, in (0.5, 1] 0.6, 0.8 and 1.0
    with two right. The error is 2/5 |1/2 - 0.3| + 3/5 |2/3 - 0.8| = 0.16."""
    made = Reliability.of(np.array([0.2, 0.4, 0.6, 0.8, 1.0]), np.array([True, False, True, True, False]), bins=2)
    assert made.error == pytest.approx(0.16)
    first, second = made.table()
    assert (first["above"], first["to"], first["count"]) == (0.0, 0.5, 2)
    assert first["confidence"] == pytest.approx(0.3) and first["accuracy"] == 0.5
    assert second["count"] == 3 and second["accuracy"] == pytest.approx(2 / 3)


@pytest.mark.parametrize("bins", [1, 7, 15])
def test_the_error_is_that_of_its_definition(bins):
    random = np.random.default_rng(bins)
    confidence = random.uniform(size=500)
    correct = random.uniform(size=500) < confidence**2
    expected = 0.0
    for m in range(1, bins + 1):
        inside = (confidence > (m - 1) / bins) & (confidence <= m / bins)
        if inside.any():
            expected += inside.mean() * abs(correct[inside].mean() - confidence[inside].mean())
    assert Reliability.of(confidence, correct, bins).error == pytest.approx(expected)


def test_limits_belong_to_the_bin_below_and_rounding_stays_inside():
    made = Reliability.of(np.array([0.0, 0.5, 1.0, 1.0 + 1e-9]), np.ones(4, bool), bins=2)
    assert made.counts.tolist() == [2, 2]


def test_a_model_that_knows_how_sure_it_may_be_has_no_error():
    confidence = np.repeat([0.25, 0.75], 4)
    correct = np.array([1, 0, 0, 0, 1, 1, 1, 0], bool)
    assert Reliability.of(confidence, correct).error == pytest.approx(0, abs=1e-12)


def test_nothing_has_no_error():
    empty = Reliability.of(np.zeros(0), np.zeros(0, bool))
    assert math.isnan(empty.error) and empty.table() == []


def test_entropy_is_that_of_scipy():
    rows = np.random.default_rng(0).dirichlet(np.ones(9), size=5)
    rows[0] = np.eye(9)[3]
    assert entropy(rows) == pytest.approx(stats.entropy(rows, axis=1))
